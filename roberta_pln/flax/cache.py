"""A decoder's cache in arrays whose shapes no step changes, so that one compilation serves every step.

A model's `init_cache` makes it, empty; a call takes it as `past_key_values` and returns it with what is new. It is
nested as in transformers, for the base model without the first level, and the layers are numbered from "0":

    {"roberta_prelayernorm": {"encoder": {"layer": {"0": {"attention": {"self": {
        "cached_key": (B, max_length, H, K), "cached_value": (B, max_length, H, K), "cache_index": () int32}}}}}}}

It holds the keys and values of self-attention; those of cross-attention are computed anew at every step. `generate`
keeps them too: its cache is a tuple with an item for each layer, as one that grows, with slots for self-attention.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jax.typing import DTypeLike

from roberta_pln import checks
from roberta_pln.config import RobertaPreLayerNormConfig
from roberta_pln.flax.layers import readable
from roberta_pln.schema import PREFIX

NAMES = ("cached_key", "cached_value", "cache_index")
"""What the nested form has for each layer."""

Path = tuple[str, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """Keys or values of one layer in an array of a fixed size, where a growing cache has an array of its tokens."""

    array: Array  # (B, max_length, H, K), or (B, H, max_length, K)
    tokens: Array  # () int32, how many slots are taken; they are the first ones
    axis: int = field(default=1, metadata=dict(static=True))  # of the slots; 2 is what attention reads without a copy

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, H, max_length, K)."""
        shape = self.array.shape
        return shape if self.axis == 2 else (shape[0], shape[2], shape[1], shape[3])


StaticCache = Mapping[str, Any]
"""The nested form."""
LayerCache = tuple[Array | Slots, ...]
"""Self keys and values, and with cross-attention also cross keys and values; each (B, H, S, K), or slots."""
Cache = tuple[LayerCache, ...] | StaticCache
"""What a call takes and returns: an item for each layer, or the nested form."""


# ------------------------------------------------------------- keys or values: an array, or slots


def append(past: Array | Slots, new: Array) -> Array | Slots:
    """Keys or values with T new ones (B, H, T, K) behind them, which become NaN where fewer than T slots are left."""
    if not isinstance(past, Slots):
        return jnp.concatenate((past, new), axis=2)
    tokens = past.tokens + new.shape[2]
    fit = (past.tokens >= 0) & (tokens <= past.shape[2])
    new = jnp.where(fit, new, jnp.nan)  # the update below shifts what does not fit to where it does
    new = new.swapaxes(past.axis, 2)
    return replace(
        past, array=jax.lax.dynamic_update_slice_in_dim(past.array, new, past.tokens, past.axis), tokens=tokens
    )


def entries(past: Array | Slots) -> Array:
    """Keys or values, (B, H, S, K); slots that are not taken are among them."""
    return past.array.swapaxes(past.axis, 2) if isinstance(past, Slots) else past


def length(past: Array | Slots) -> int | Array:
    """The number of tokens."""
    return past.tokens if isinstance(past, Slots) else past.shape[2]


def with_room(past: Sequence[Sequence[Array]], max_length: int, rows: int) -> tuple[LayerCache, ...]:
    """A cache of plain arrays as one with room for `max_length` tokens; those of cross-attention keep their size.

    Args:
        past: what a call on the prompts returned.
        max_length: tokens of prompt and continuation.
        rows: how many rows continue each prompt.
    """
    return tuple(
        (
            *(_slots(part.repeat(rows, axis=0), max_length) for part in layer[:2]),
            *(part.repeat(rows, axis=0) for part in layer[2:]),
        )
        for layer in past
    )


def reorder(past: tuple[LayerCache, ...], rows: Array) -> tuple[LayerCache, ...]:
    """Give every row the cache of another. Cross-attention stays: rows of one prompt have the same there."""
    return tuple((*(replace(part, array=part.array[rows]) for part in layer[:2]), *layer[2:]) for layer in past)


def _slots(part: Array, max_length: int) -> Slots:
    tokens = part.shape[2]
    return Slots(jnp.pad(part, ((0, 0), (0, 0), (0, max_length - tokens), (0, 0))), jnp.int32(tokens), axis=2)


# ------------------------------------------------------------- the nested form


def init(config: RobertaPreLayerNormConfig, batch_size: int, max_length: int, dtype: DTypeLike) -> dict[str, Any]:
    """An empty cache of the base model.

    Raises:
        InputError: when the model has no cache, or there are more slots than positions.
    """
    if not config.is_decoder or not config.num_hidden_layers:
        raise checks.InputError(
            f"a cache is for a decoder with layers, got is_decoder={config.is_decoder} and "
            f"num_hidden_layers={config.num_hidden_layers}: set is_decoder=True in the config"
        )
    check_length(max_length, config)
    arrays = layout(config, batch_size, max_length, dtype)
    return unflatten_dict({path: jnp.zeros(shape, kind) for path, (shape, kind) in arrays.items()})


def layout(
    config: RobertaPreLayerNormConfig, batch: int, length: int | None, dtype: DTypeLike
) -> dict[Path, tuple[checks.Shape, DTypeLike]]:
    """Shape and type of every array of the base model's cache."""
    arrays = {}
    for layer in range(config.num_hidden_layers):
        slots = ((batch, length, len(config.kept_heads(layer)), config.head_size), dtype)
        for name, array in zip(NAMES, (slots, slots, ((), jnp.int32)), strict=True):
            arrays["encoder", "layer", str(layer), "attention", "self", name] = array
    return arrays


def check(past: StaticCache, batch: int, config: RobertaPreLayerNormConfig, dtype: DTypeLike) -> None:
    """A cache is what `init_cache` or an earlier call of this model on as many rows returned.

    Raises:
        InputError: naming what is missing, unexpected, or of another shape or type.
    """
    arrays, wanted = flatten_dict(of_base(past)), layout(config, batch, None, dtype).keys()
    problems = [f"missing: {'.'.join(path)}" for path in wanted if path not in arrays]
    problems += [f"unexpected: {'.'.join(map(str, path))}" for path in arrays if path not in wanted]
    if problems or not arrays:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise checks.InputError(f"past_key_values must be what init_cache or an earlier call returned{listed}")
    for path, (shape, kind) in layout(config, batch, max_length(past), dtype).items():
        name, seen = f"{'.'.join(path)} of past_key_values", arrays[path]
        checks.shape(name, seen.shape, shape)
        if seen.dtype != kind:
            raise checks.InputError(f"{name} must be {jnp.dtype(kind)}, got {seen.dtype}")
    check_length(max_length(past), config)


def check_length(length: int, config: RobertaPreLayerNormConfig) -> None:
    """A cache has no more slots than there are positions."""
    if not 0 < length <= config.max_position_embeddings:
        raise checks.InputError(
            f"max_length must be at least 1 and at most max_position_embeddings ({config.max_position_embeddings}), "
            f"got {length}"
        )


def first_layer(past: StaticCache) -> StaticCache:
    """The arrays of layer 0."""
    return of_base(past)["encoder"]["layer"]["0"]["attention"]["self"]


def max_length(past: StaticCache) -> int | None:
    """How many slots there are, None when the keys have no such axis."""
    shape = first_layer(past)["cached_key"].shape
    return shape[1] if len(shape) == 4 else None


def tokens(past: StaticCache) -> int | Array:
    """How many slots are taken, as a plain number where it can be read."""
    index = jnp.asarray(first_layer(past)["cache_index"])
    return int(index) if readable(index) else index


def keys(past: Cache | None, past_length: int | Array, queries: int) -> int:
    """How many keys the queries meet: as many as there are tokens, or every slot.

    Raises:
        InputError: when there are more tokens than slots.
    """
    if not isinstance(past, Mapping):
        slots = past and isinstance(past[0][0], Slots)
        return past[0][0].shape[2] if slots else past_length + queries
    taken = past_length if isinstance(past_length, int) else 0
    if taken < 0 or taken + queries > max_length(past):
        raise checks.InputError(
            f"a cache of max_length={max_length(past)} cannot take {queries} tokens behind {taken}: make a longer one"
        )
    return max_length(past)


def unpack(past: Cache | None) -> tuple[LayerCache, ...] | None:
    """A cache as the encoder takes it, with an item for each layer."""
    if not isinstance(past, Mapping):
        return past
    index = jnp.asarray(first_layer(past)["cache_index"])  # it is the same in every layer
    layers = of_base(past)["encoder"]["layer"]
    items = [layers[str(i)]["attention"]["self"] for i in range(len(layers))]
    return tuple(tuple(Slots(jnp.asarray(item[name]), index) for name in NAMES[:2]) for item in items)


def pack(layers: tuple[LayerCache, ...], past: StaticCache) -> dict[str, Any]:
    """The nested form of what the encoder returns, with the first level if `past` has it."""
    nested = {}
    for i, (key, value, *_) in enumerate(layers):
        nested[str(i)] = {"attention": {"self": dict(zip(NAMES, (key.array, value.array, key.tokens), strict=True))}}
    base = {"encoder": {"layer": nested}}
    return {PREFIX: base} if PREFIX in past else base


def of_base(past: StaticCache) -> StaticCache:
    """A cache without the first level."""
    return past.get(PREFIX, past)
