"""Changes of a model's shape, made on canonical tensors: the same new tensors, bit for bit, in every backend."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import numpy as np

from roberta_pln import schema
from roberta_pln.config import ConfigError, RobertaPreLayerNormConfig

Tensors = dict[str, np.ndarray]

WORD_TABLE: Final = f"{schema.PREFIX}.embeddings.word_embeddings.weight"
DECODER: Final = "lm_head.decoder.weight"
LM_BIAS: Final = "lm_head.bias"

NEW_ROW_SPREAD: Final = 1e-9
"""Share of the old rows' covariance with which new rows scatter around the old rows' mean."""


def vocabulary_size(
    config: RobertaPreLayerNormConfig, new_num_tokens: int | None, pad_to_multiple_of: int | None
) -> int:
    """The number of tokens that `resize_token_embeddings` is asked for.

    Raises:
        ConfigError: when it is no positive integer, or a special token would be cut off.
    """
    size = config.vocab_size if new_num_tokens is None else new_num_tokens
    multiple = 1 if pad_to_multiple_of is None else pad_to_multiple_of
    for name, value in (("new_num_tokens", size), ("pad_to_multiple_of", multiple)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}")
    size = -(-size // multiple) * multiple
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    special = [token for token in (config.pad_token_id, config.bos_token_id, *ends) if token is not None]
    least = max(token for token in special if token < config.vocab_size) + 1
    if size < least:
        raise ConfigError(
            f"a smaller vocabulary must keep the special tokens (pad_token_id, bos_token_id, eos_token_id), which "
            f"needs new_num_tokens of at least {least}, got {size}"
        )
    return size


def resize_vocabulary(
    tensors: Mapping[str, np.ndarray],
    config: RobertaPreLayerNormConfig,
    size: int,
    mean_resizing: bool = True,
    seed: int = 0,
) -> tuple[Tensors, RobertaPreLayerNormConfig]:
    """Give the word table, and a language-model head's decoder and bias, another number of rows.

    Args:
        tensors: canonical tensors of a model; not changed.
        config: its config; not changed.
        size: the new number of rows. Rows at the end are cut off, or new ones appended.
        mean_resizing: new rows are drawn from a normal distribution with the mean of the old rows and
            `NEW_ROW_SPREAD` times their covariance (Hewitt 2021, "Initializing New Word Embeddings for Pretrained
            Language Models"), so that a new token is as likely as the average one; otherwise they are fresh weights,
            N(0, initializer_range^2). New entries of the bias are zero.
        seed: where the new rows are drawn from.

    Returns:
        The tensors that change, and the new config.
    """
    rng = np.random.default_rng(seed)
    scale = None if mean_resizing else config.initializer_range
    changed = {name: _resized(tensors[name], size, scale, rng) for name in (WORD_TABLE, DECODER) if name in tensors}
    if LM_BIAS in tensors:
        bias = tensors[LM_BIAS][:size]
        changed[LM_BIAS] = np.concatenate((bias, np.zeros(size - len(bias), bias.dtype)))
    return changed, config.replace(vocab_size=size)


def _resized(table: np.ndarray, size: int, scale: float | None, rng: np.random.Generator) -> np.ndarray:
    """The first rows of a table, and new ones behind them, drawn in float64."""
    kept = table[:size]
    shape = (size - len(kept), table.shape[1])
    if scale is not None:
        new = scale * rng.standard_normal(shape)
    else:
        rows = np.ascontiguousarray(table, np.float64)  # in one order, since sums in another differ in the last bit
        mean = rows.mean(axis=0)
        # A random combination of the centred rows has their covariance, without a (D, D) matrix to factor.
        combination = rng.standard_normal((shape[0], len(rows))) / np.sqrt(len(rows))
        new = mean + np.sqrt(NEW_ROW_SPREAD) * combination @ (rows - mean)
    return np.concatenate((kept, new.astype(table.dtype)))


def prune_heads(
    tensors: Mapping[str, np.ndarray], config: RobertaPreLayerNormConfig, heads: Mapping[int, Iterable[int]]
) -> tuple[Tensors, RobertaPreLayerNormConfig]:
    """Remove heads of the self-attention: rows of query, key and value, columns of the dense layer behind them.

    Args:
        tensors: canonical tensors of a model; not changed.
        config: its config; not changed.
        heads: heads to remove by layer, in the original numbering; those removed before may be among them.

    Returns:
        The tensors that change, and the new config, whose `pruned_heads` are all that were ever removed.

    Raises:
        ConfigError: when a layer or head is not there, or a layer would lose all of its heads.
    """
    before = config.pruned_heads
    after = {layer: {*before.get(layer, ()), *heads.get(layer, ())} for layer in {*before, *heads}}
    new_config = config.replace(pruned_heads={layer: sorted(removed) for layer, removed in after.items() if removed})
    changed: Tensors = {}
    for layer in new_config.pruned_heads:
        there, kept = config.kept_heads(layer), new_config.kept_heads(layer)
        if kept != there:
            positions = [there.index(head) for head in kept]
            attention = f"{schema.PREFIX}.encoder.layer.{layer}.attention"
            changed |= _keep_heads(tensors, attention, positions, config.head_size)
    return changed, new_config


def _keep_heads(tensors: Mapping[str, np.ndarray], attention: str, positions: list[int], head_size: int) -> Tensors:
    """One attention's tensors, reduced to the heads at some positions."""
    rows = np.concatenate([np.arange(position * head_size, (position + 1) * head_size) for position in positions])
    projections = [
        f"{attention}.self.{name}.{leaf}" for name in ("query", "key", "value") for leaf in ("weight", "bias")
    ]
    dense = f"{attention}.output.dense.weight"
    return {**{name: tensors[name][rows] for name in projections}, dense: tensors[dense][:, rows]}
