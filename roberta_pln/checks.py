"""What a call refuses, with the same error type and words in every backend.

Every function looks at shapes and plain numbers only, so that a backend can call it while tracing. Whatever needs the
values of a tensor takes them as numbers that the backend has read; compiled code, which cannot read them, gives NaN
for ids that are out of range.
"""

from __future__ import annotations

from typing import Any

from roberta_pln.config import RobertaPreLayerNormConfig
from roberta_pln.schema import LM_HEADS, architecture

Shape = tuple[int | None, ...]
"""Lengths of a tensor's axes; None where a traced graph leaves one open."""


class InputError(ValueError):
    """A call's arguments break a rule; the message names the rule, the value seen and the remedy."""

    _keras_call_info_injected = True  # tells Keras to leave the message as it is


def own_config(config: object) -> None:
    """A model is made of this library's config."""
    if not isinstance(config, RobertaPreLayerNormConfig):
        kind = f"{type(config).__module__}.{type(config).__name__}"
        raise TypeError(
            f"config must be a roberta_pln.config.RobertaPreLayerNormConfig, got {kind}; its from_dict makes one of "
            f"another library's config.to_dict()"
        )


def one_of_ids_and_embeds(has_input_ids: bool, has_inputs_embeds: bool) -> None:
    """Exactly one of `input_ids` and `inputs_embeds` is needed."""
    if has_input_ids and has_inputs_embeds:
        raise InputError("You cannot specify both input_ids and inputs_embeds at the same time")
    if not has_input_ids and not has_inputs_embeds:
        raise InputError("You have to specify either input_ids or inputs_embeds")


def integer(name: str, dtype: str) -> None:
    """Ids and labels are integers; `dtype` is the name of the tensor's type."""
    if "int" not in dtype:
        raise InputError(f"{name} must be integers, got {dtype}")


def switches(**values: object) -> None:
    """Switches decide what is computed, so compiled code needs them as Python's values."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise InputError(
                f"{name} must be True or False, a value of Python that is known when code is compiled (an argument of "
                f"jax.jit needs static_argnames), got {type(value).__name__}"
            )


def wants_logits(output_logits: bool | None, labelled: bool, training: bool) -> bool:
    """Whether a language model returns logits: as `output_logits` says; if that is None, unless it trains on labels."""
    if output_logits is None:
        return not (labelled and training)
    switches(output_logits=output_logits)
    return output_logits


def no_second_derivative() -> NotImplementedError:
    """What to raise where the gradients of a loss without logits are differentiated."""
    return NotImplementedError(
        "a language model's loss without logits has no second derivative: call the model with output_logits=True"
    )


def shape(name: str, seen: Shape, *allowed: Shape) -> None:
    """A tensor has one of the allowed shapes; None stands for any length."""
    if not any(_fits(seen, shape) for shape in allowed):
        wanted = " or ".join(_text(shape) for shape in allowed)
        raise InputError(f"{name} must have shape {wanted}, got {_text(seen)}")


def attention_mask(
    name: str, seen: Shape, batch: int | None, queries: int | None, keys: int | None, heads: int
) -> None:
    """A mask is (B, S), or the complete pattern as (B, T, S), (B, 1, T, S) or (B, H, T, S)."""
    whole = (queries, keys)
    shape(name, seen, (batch, keys), (batch, *whole), (batch, 1, *whole), (batch, heads, *whole))


def head_mask(seen: Shape, config: RobertaPreLayerNormConfig) -> None:
    """A head mask is (H,) for all layers, or (N, H)."""
    heads = config.num_attention_heads
    shape("head_mask", seen, (heads,), (config.num_hidden_layers, heads))


def past_key_values(
    past: Any, batch: int | None, encoder_tokens: int | None, config: RobertaPreLayerNormConfig
) -> None:
    """A cache is what an earlier call on as many rows returned.

    Args:
        past: for every layer self keys and values, and perhaps cross keys and values, which may be None.
        batch: rows of the batch.
        encoder_tokens: tokens of the encoder's states, 0 without them.
        config: the model's config.
    """
    if not isinstance(past, tuple | list):
        raise InputError(
            f"past_key_values must be what an earlier call returned, a tuple with an item for each layer, got "
            f"{type(past).__name__}; a cache of transformers becomes one by its to_legacy_cache()"
        )
    if len(past) not in (0, config.num_hidden_layers):
        raise InputError(
            f"past_key_values must have an item for each of the {config.num_hidden_layers} layers, got {len(past)}"
        )
    for index, layer in enumerate(past):
        name, size = f"past_key_values[{index}]", config.head_size
        shapes = [None if part is None else tuple(part.shape) for part in layer]
        if len(shapes) not in (2, 4) or None in shapes[:2]:
            raise InputError(
                f"{name} must hold self keys and values, or these and cross keys and values, got {len(shapes)} items"
            )
        length = past[0][0].shape[2] if len(past[0][0].shape) == 4 else None
        for part, seen in enumerate(shapes):
            if seen is None:
                continue
            if part >= 2 and encoder_tokens == 0:
                raise InputError(
                    f"{name} holds cross keys and values, which are read with encoder_hidden_states only: give them "
                    f"in every call"
                )
            heads = len(config.kept_heads(index)) if part < 2 else config.num_attention_heads
            shape(f"{name}[{part}]", seen, (batch, heads, length if part < 2 else encoder_tokens, size))


_NOT_WITH_SEGMENTS = {
    "attention_mask": "number the padding 0 in segment_ids",
    "past_key_values": "a text that goes on needs a row for itself",
    "encoder_hidden_states": "a text that reads an encoder needs a row for itself",
}


def segments(**others: object) -> None:
    """Texts that share a row come without what belongs to the whole row; each argument by its name, None if absent."""
    for name, value in others.items():
        if value is not None:
            raise InputError(f"segment_ids and {name} cannot be given together: {_NOT_WITH_SEGMENTS[name]}")


def segment_numbers(lowest: int) -> None:
    """Segments are numbered from 1, and 0 is padding."""
    if lowest < 0:
        raise InputError(f"segment_ids must be at least 0, which is padding, got {lowest}: number the texts from 1")


def sequence_length(tokens: int | None, past: int, config: RobertaPreLayerNormConfig, automatic: bool) -> None:
    """A sequence fits the position table.

    Args:
        tokens: tokens of this call, None when a traced graph leaves it open.
        past: tokens in the cache.
        config: the model's config.
        automatic: whether the model numbers the positions of whole rows; others are checked by value.
    """
    if tokens is None:
        return
    if automatic and config.position_embedding_type == "absolute":
        limit, rule = config.max_sequence_length, "max_position_embeddings - pad_token_id - 1"
    elif config.position_embedding_type != "absolute":
        limit, rule = config.max_position_embeddings, "max_position_embeddings"
    else:
        return
    if past + tokens > limit:
        seen = f"{past + tokens}" if past == 0 else f"{past + tokens} ({past} cached and {tokens} new)"
        raise InputError(
            f"a sequence must have at most {limit} tokens ({rule}), got {seen}: shorten it, split it into windows, or "
            f"use a checkpoint with a longer position table"
        )


def in_range(name: str, lowest: int, highest: int, size: int, size_name: str) -> None:
    """Ids select rows of a table: none is below 0 or not below the table's size."""
    if lowest < 0 or highest >= size:
        seen = lowest if lowest < 0 else highest
        raise InputError(f"{name} must be at least 0 and below {size_name} ({size}), got {seen}")


def some_places(count: int | None) -> None:
    """Places name a token or more of each row; `count` is None when a traced graph leaves it open."""
    if count == 0:
        raise InputError("places must name a token or more of each row, got none: leave the argument out for all")


def labels_in_range(name: str, lowest: int, highest: int, size: int, ignore_index: int) -> None:
    """Labels that are not ignored name a class; `lowest` and `highest` are taken over those."""
    if lowest < 0 or highest >= size:
        seen = lowest if lowest < 0 else highest
        raise InputError(f"{name} must be at least 0 and below {size}, or {ignore_index} to be ignored, got {seen}")


def two_labels(config: RobertaPreLayerNormConfig) -> None:
    """Question answering has a start and an end."""
    if config.num_labels != 2:
        raise InputError(f"question answering needs num_labels=2 (start and end), got {config.num_labels}")


def problem_type(config: RobertaPreLayerNormConfig, batch: int | None, seen: Shape, integers: bool) -> str:
    """The kind of loss of a sequence classifier, checked against its labels.

    Args:
        config: `problem_type` decides if it is set; if not, the number of labels and the labels' type do: one label
            is a regression, integers are classes, and other numbers are independent targets.
        batch: rows of the batch.
        seen: shape of the labels.
        integers: whether the labels are integers.

    Raises:
        InputError: when the labels do not fit.
    """
    count = config.num_labels
    kind = config.problem_type
    if kind is None:
        many = "single_label_classification" if integers else "multi_label_classification"
        kind = "regression" if count == 1 else many
    if kind == "single_label_classification" and not integers:
        raise InputError(f"labels of a {kind} must be integers, got floating-point numbers; see config.problem_type")
    if kind == "multi_label_classification" and integers:
        raise InputError(f"labels of a {kind} must be floating-point numbers, got integers; see config.problem_type")
    one = kind == "single_label_classification" or (kind == "regression" and count == 1)
    shape(f"labels of a {kind}", seen, *(((batch,), (batch, 1)) if one else ((batch, count),)))
    return kind


def encoder_states(config: RobertaPreLayerNormConfig) -> None:
    """Encoder states need layers that read them."""
    if config.is_decoder and not config.add_cross_attention:
        raise InputError(
            "If `encoder_hidden_states` are passed, the model has to be instantiated with cross-attention layers by "
            "setting `config.add_cross_attention=True`"
        )


def own_decoder(config: RobertaPreLayerNormConfig, head: str) -> None:
    """Output embeddings can be set where they are not the word table."""
    if head not in LM_HEADS:
        raise InputError(f"{architecture(head)} has no output embeddings: they belong to {' and '.join(LM_HEADS)}")
    if config.tie_word_embeddings:
        raise InputError(
            "the output embeddings are the word table: use set_input_embeddings, or a model whose config has "
            "tie_word_embeddings=False"
        )


def table(seen: Shape, wanted: Shape) -> None:
    """A word table, or a decoder, is replaced by one of the same shape."""
    if seen != wanted:
        raise InputError(
            f"embeddings must have shape (vocab_size, hidden_size) = {_text(wanted)}, got {_text(seen)}; "
            f"resize_token_embeddings changes the number of tokens"
        )


def chunks(tokens: int | None, size: int) -> None:
    """`chunk_size_feed_forward` divides the sequence."""
    if tokens is not None and tokens % size:
        raise InputError(
            f"the sequence length must be a multiple of chunk_size_feed_forward ({size}), got {tokens}: pad the batch "
            f"or set chunk_size_feed_forward to 0"
        )


def _fits(seen: Shape, wanted: Shape) -> bool:
    return len(seen) == len(wanted) and all(a == b or a is None or b is None for a, b in zip(seen, wanted, strict=True))


def _text(shape: Shape) -> str:
    return (
        "(" + ", ".join("any" if length is None else str(length) for length in shape) + ("," * (len(shape) == 1)) + ")"
    )
