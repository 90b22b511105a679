"""A decoder's cache in tensors whose shapes no step changes, so that one compilation serves every step."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import tensorflow as tf

from roberta_pln.tf.layers import shape_of


class Slots(NamedTuple):
    """Keys or values of one layer, (B, H, S, K), in a tensor that has room for more.

    Only the loop of a generation uses it, with a mask over all slots; elsewhere a cache is made of plain tensors.
    """

    tensor: tf.Tensor  # (B, H, max_length, K)
    tokens: tf.Tensor  # () int32, how many slots are taken; they are the first ones

    xla = False

    @property
    def shape(self) -> tf.TensorShape:
        """(B, H, max_length, K)."""
        return self.tensor.shape


class XlaSlots(Slots):
    """Slots in what XLA compiles."""

    xla = True


def append(past: tf.Tensor | Slots, new: tf.Tensor) -> tf.Tensor | Slots:
    """Keys or values with T new ones (B, H, T, K) behind them."""
    if not isinstance(past, Slots):
        return tf.concat((past, new), axis=2)
    batch, heads, count, _ = new.shape
    axes = tf.range(batch), tf.range(heads), past.tokens + tf.range(count)
    places = tf.stack(tf.meshgrid(*axes, indexing="ij"), axis=-1)  # (B, H, T, 3)
    return type(past)(put(past.tensor, places, new, past.xla), past.tokens + count)


def put(tensor: tf.Tensor, places: tf.Tensor, values: tf.Tensor, xla: bool) -> tf.Tensor:
    """A tensor with values where there are zeros yet; in a loop this works in place, and only there.

    Of TensorFlow's ways to do so the one that XLA knows copies the tensor without XLA, and the other XLA does not know.
    """
    if xla:
        return tf.tensor_scatter_nd_update(tensor, places, values)
    return tf.raw_ops.ScatterNdNonAliasingAdd(input=tensor, indices=places, updates=values)


def entries(past: tf.Tensor | Slots) -> tf.Tensor:
    """Keys or values, (B, H, S, K); slots that are not taken are among them."""
    return past.tensor if isinstance(past, Slots) else past


def length(past: tf.Tensor | Slots) -> int | tf.Tensor:
    """The number of tokens."""
    return past.tokens if isinstance(past, Slots) else shape_of(past)[2]


def with_room(
    past: Sequence[Sequence[tf.Tensor]], room: int, rows: Callable[[tf.Tensor], tf.Tensor]
) -> tuple[tuple[tf.Tensor, ...], ...]:
    """The tensors of a cache with room for more tokens; those of cross-attention keep their size.

    Args:
        past: what a call on the prompts returned.
        room: how many tokens more.
        rows: gives a tensor of the prompts' rows the rows that continue them.
    """
    spare = ((0, 0), (0, 0), (0, room), (0, 0))
    return tuple((*(rows(tf.pad(part, spare)) for part in layer[:2]), *map(rows, layer[2:])) for layer in past)


def slots(
    past: Sequence[Sequence[tf.Tensor]], tokens: int | tf.Tensor, xla: bool
) -> tuple[tuple[tf.Tensor | Slots, ...], ...]:
    """Tensors as a call takes them: all with the same number of tokens; those of cross-attention as they are."""
    kind, tokens = XlaSlots if xla else Slots, tf.convert_to_tensor(tokens)
    return tuple((*(kind(part, tokens) for part in layer[:2]), *layer[2:]) for layer in past)


def tensors(past: Sequence[Sequence[tf.Tensor | Slots]]) -> tuple[tuple[tf.Tensor, ...], ...]:
    """The tensors of a cache, which a loop keeps."""
    return tuple(tuple(map(entries, layer)) for layer in past)


def reorder(past: Sequence[Sequence[tf.Tensor]], rows: tf.Tensor) -> tuple[tuple[tf.Tensor, ...], ...]:
    """Give every row the cache of another. Cross-attention stays: rows of one prompt have the same there."""
    return tuple((*(tf.gather(part, rows) for part in layer[:2]), *layer[2:]) for layer in past)
