"""What `torch.nn` is for `pt`: the layers that hold weights, dropout, and recomputation.

Weights are there as soon as a layer is constructed, with any values until `weights` fills them. Every layer casts
them to its compute dtype where it uses them, so that mixed-precision policies need no autocasting.
"""

import math
from collections.abc import Callable
from contextvars import ContextVar
from functools import reduce
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf


class Shared(NamedTuple):
    """What all layers of one model have in common."""

    dtype: keras.dtype_policies.DTypePolicy
    seed_generator: keras.random.SeedGenerator


class Module(keras.layers.Layer):
    """A layer whose inputs and weights nobody casts but itself, and that needs no `build`."""

    def __init__(self, shared: Shared) -> None:
        super().__init__(dtype=shared.dtype, autocast=False)
        self.built = True

    def add_weight(self, shape: tuple[int, ...], name: str, **options: Any) -> keras.Variable:
        """A weight that reads in its own dtype everywhere; it has memory, but no values yet."""
        return super().add_weight(shape, initializer=_any_values, name=name, autocast=False, **options)

    def replace_weight(self, name: str, shape: tuple[int, ...]) -> None:
        """Put a weight of another shape in the place of one, with any values."""
        old = getattr(self, name)
        self._tracker.unlock()  # Keras closes the list of weights of a layer that is built, and so its own layers do
        self._untrack_variable(old)
        setattr(self, name, self.add_weight(shape, name, trainable=old.trainable))
        self._tracker.lock()


def _any_values(shape: tuple[int, ...], dtype: Any) -> tf.Tensor:
    """What is in memory: zeros would cost as much time as loading a checkpoint does."""
    return tf.raw_ops.Empty(shape=shape, dtype=dtype, init=False)


class Dense(Module):
    """x kernel + bias over the last axis, and an activation of that if one is given."""

    def __init__(self, inputs: int, outputs: int, shared: Shared, bias: bool = True) -> None:
        super().__init__(shared)
        self.kernel = self.add_weight((inputs, outputs), "kernel")
        self.bias = self.add_weight((outputs,), "bias") if bias else None

    def call(self, inputs: tf.Tensor, activation: Callable[[tf.Tensor], tf.Tensor] | None = None) -> tf.Tensor:
        bias = None if self.bias is None else tf.cast(self.bias, self.compute_dtype)
        return linear(inputs, tf.cast(self.kernel, self.compute_dtype), bias, activation=activation)


class Embedding(Module):
    """Rows of a table, (...) -> (..., D); an id that names no row gives NaN. Row `padding_idx` gets no gradient."""

    def __init__(self, num_embeddings: int, size: int, shared: Shared, padding_idx: int | None = None) -> None:
        super().__init__(shared)
        self.padding_idx = padding_idx
        self.embeddings = self.add_weight((num_embeddings, size), "embeddings")

    @property
    def num_embeddings(self) -> int:
        """Rows of the table."""
        return self.embeddings.shape[0]

    def call(self, ids: tf.Tensor) -> tf.Tensor:
        # For ids out of range a gather raises on one device, gives zeros on another, and the nearest row under XLA.
        known = (ids >= 0) & (ids < self.num_embeddings)
        # The reshape makes the gradient dense: of slices, Keras' Adam squares those of one row each for itself.
        table = tf.reshape(self.embeddings, self.embeddings.shape)
        rows = tf.cast(tf.gather(table, tf.where(known, ids, 0)), self.compute_dtype)
        if self.padding_idx is not None:
            rows = tf.where((ids == self.padding_idx)[..., None], tf.stop_gradient(rows), rows)
        return tf.where(known[..., None], rows, math.nan)


class LayerNorm(Module):
    """(x - mean) / sqrt(variance + eps) * gamma + beta over the last axis, in at least float32."""

    def __init__(self, size: int, eps: float, shared: Shared) -> None:
        super().__init__(shared)
        self.eps = eps
        self.gamma = self.add_weight((size,), "gamma")
        self.beta = self.add_weight((size,), "beta")

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        dtype = at_least_float32(inputs.dtype)
        scale, offset = tf.cast(self.gamma, dtype), tf.cast(self.beta, dtype)
        normalise = self.normalise_in_training if training else self.normalise
        return tf.cast(normalise(inputs, scale, offset), self.compute_dtype)

    def normalise(self, inputs: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor) -> tf.Tensor:
        """In the type of scale and offset."""
        normalised, _ = self.parts(tf.cast(inputs, scale.dtype))
        return normalised * scale + offset

    def normalise_in_training(self, inputs: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor) -> tf.Tensor:
        """`normalise`, whose gradient shares what it can with the value."""

        @tf.custom_gradient
        def normalise(inputs: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor) -> tuple[tf.Tensor, Callable]:
            normalised, inverse = self.parts(tf.cast(inputs, scale.dtype))

            def gradients(upstream: tf.Tensor) -> tuple[tf.Tensor, ...]:
                slopes = upstream * scale
                along = tf.reduce_mean(slopes * normalised, axis=-1, keepdims=True)
                slopes = inverse * (slopes - tf.reduce_mean(slopes, axis=-1, keepdims=True) - along * normalised)
                return tf.cast(slopes, inputs.dtype), sum_of_rows(upstream * normalised), sum_of_rows(upstream)

            return normalised * scale + offset, gradients

        return normalise(inputs, scale, offset)

    def parts(self, inputs: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """(x - mean) / sqrt(variance + eps), and 1 / sqrt(variance + eps)."""
        centred = inputs - tf.reduce_mean(inputs, axis=-1, keepdims=True)
        inverse = tf.math.rsqrt(tf.reduce_mean(tf.square(centred), axis=-1, keepdims=True) + self.eps)
        return centred * inverse, inverse


class Dropout(Module):
    """In training, zeros elements with probability `rate` and scales the others by 1 / (1 - rate).

    16 bits decide on an element, which takes half as long as a number of float32: the share of a call is a multiple of
    2**-16, below or above the rate so often that each element's probability is the rate.
    """

    def __init__(self, rate: float, shared: Shared) -> None:
        super().__init__(shared)
        self.rate = rate
        self.seed_generator = shared.seed_generator

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        if not training or self.rate == 0:
            return inputs
        if self.rate == 1:
            return tf.zeros_like(inputs)
        seed = tf.cast(next_seed(self.seed_generator), tf.int32)
        draw = self.draw if self.is_coarse() else self.draw_finely
        return tf.where(draw(shape_of(inputs), seed), inputs * (1 / (1 - self.rate)), 0)

    def is_coarse(self) -> bool:
        """Whether 16 bits are enough for this rate."""
        return 2**-8 <= self.rate <= 1 - 2**-8

    def draw(self, shape: list[int | tf.Tensor], seed: tf.Tensor) -> tf.Tensor:
        """Which elements stay."""
        count = math.prod(shape)
        numbers = tf.random.stateless_uniform((1 + (count + 1) // 2,), seed, None, None, tf.uint32)
        rest, whole = math.modf(self.rate * 2**16)
        one_more = numbers[-1] > np.uint32((1 - rest) * 2**32 - 1)
        zeros = tf.cast(one_more, tf.int16) + np.int16(whole - 2**15)  # of the 2**16 numbers those that are smaller
        stay = tf.bitcast(numbers[:-1], tf.int16) >= zeros
        even = isinstance(count, int) and count % 2 == 0
        return tf.reshape(stay if even else tf.reshape(stay, (-1,))[:count], shape)

    def draw_finely(self, shape: list[int | tf.Tensor], seed: tf.Tensor) -> tf.Tensor:
        """The same for a rate that 16 bits are too coarse for."""
        return tf.random.stateless_uniform(shape, seed) >= self.rate


class Replay:
    """The seeds that a generator gives from a state on, without touching the generator."""

    def __init__(self, state: tf.Tensor) -> None:
        self.state, self.count = state, 0

    def next(self) -> tf.Tensor:
        seed = self.state + self.behind
        self.count += 1
        return seed

    @property
    def behind(self) -> np.ndarray:
        """How far it has gone."""
        return np.array([0, self.count])


_replay: ContextVar[Replay | None] = ContextVar("replay", default=None)

seeded_apart: ContextVar[bool] = ContextVar("seeded_apart", default=False)
"""Whether the replicas of a distributed step have put their copies of the generator into states of their own."""


def next_seed(generator: keras.random.SeedGenerator) -> tf.Tensor:
    """The generator's next seed, (2,); each replica of a distributed step has its own."""
    seed = (_replay.get() or generator).next()
    replica = tf.distribute.get_replica_context()
    if replica is None or replica.num_replicas_in_sync == 1 or seeded_apart.get():
        return seed
    return tf.random.experimental.stateless_fold_in(seed, replica.replica_id_in_sync_group)


def recomputed(function: Callable, generator: keras.random.SeedGenerator, *args: Any, **options: Any) -> Any:
    """function(*args, **options), of which the backward pass computes the insides anew instead of keeping them.

    Args:
        function: what maps nests of tensors and None to such a nest. A tensor that is to get a gradient is an argument,
            a variable may be anywhere.
        generator: what the dropout inside draws from. Both times it draws what it would have drawn without this.
    """
    outer = _replay.get()
    state, drawn, structure = generator.state * 1 if outer is None else outer.state + outer.behind, 0, None

    def differentiable(leaf: tf.Tensor | None) -> bool:
        return leaf is not None and leaf.dtype.is_floating

    def flat(*tensors: tf.Tensor) -> list[tf.Tensor]:  # what `recompute_grad` can take: no keywords, no None
        nonlocal drawn, structure
        leaves, replay = iter(tensors), Replay(state)
        token = _replay.set(replay)
        try:
            given = tf.nest.map_structure(lambda leaf: next(leaves) if differentiable(leaf) else leaf, args)
            result = function(*given, **options)
        finally:
            _replay.reset(token)
        drawn, structure = replay.count, tf.nest.map_structure(lambda leaf: leaf is not None, result)
        return [leaf for leaf in tf.nest.flatten(result) if leaf is not None]

    results = iter(tf.recompute_grad(flat)(*filter(differentiable, tf.nest.flatten(args))))
    if outer is not None:
        outer.count += drawn
    elif drawn:
        generator.state.assign(generator.state + np.array([0, drawn]))
    return tf.nest.map_structure(lambda there: next(results) if there else None, structure)


def dense_after(
    before: Callable[[tf.Tensor], tf.Tensor], x: tf.Tensor, *layers: Dense, training: bool
) -> tuple[tf.Tensor, ...]:
    """Each layer of before(x); in training without keeping before(x) for the backward pass.

    Args:
        before: a LayerNorm, or a function without parameters, that takes little time to compute anew.
        x: (..., D).
        *layers: what follows, one beside the other.
        training: whether there may be a backward pass.
    """
    normalises = isinstance(before, keras.layers.Layer)
    if not training or not all(map(is_own, (before, *layers) if normalises else layers)):
        x = before(x)
        return tuple(layer(x) for layer in layers)
    function, inputs = before, (x,)
    if normalises:
        dtype = at_least_float32(x.dtype)
        inputs = x, tf.cast(before.gamma, dtype), tf.cast(before.beta, dtype)

        def function(x: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor) -> tf.Tensor:
            return tf.cast(before.normalise_in_training(x, scale, offset), before.compute_dtype)

    count = len(layers)
    weights = [tf.cast(weight, layer.compute_dtype) for layer in layers for weight in (layer.kernel, layer.bias)]

    @tf.custom_gradient
    def products(*tensors: tf.Tensor) -> tuple[tuple[tf.Tensor, ...], Callable]:
        kernels, biases, inputs = tensors[: 2 * count : 2], tensors[1 : 2 * count : 2], tensors[2 * count :]

        def gradients(*upstream: tf.Tensor) -> list[tf.Tensor]:
            watched = [later(inputs[0], *upstream), *inputs[1:]]
            with tf.GradientTape() as tape:
                tape.watch(watched)
                found = function(*watched)
            columns, of_weights, parts = tf.reshape(found, (-1, kernels[0].shape[0])), [], []
            for kernel, above in zip(kernels, upstream, strict=True):
                rows = tf.reshape(above, (-1, kernel.shape[1]))
                of_weights += [tf.matmul(columns, rows, transpose_a=True), sum_of_rows(rows)]
                parts.append(tf.matmul(rows, kernel, transpose_b=True))
            slopes = tf.reshape(reduce(tf.add, parts), tf.shape(found))
            return of_weights + tape.gradient(found, watched, output_gradients=slopes)

        found = function(*inputs)
        return tuple(linear(found, kernel, bias) for kernel, bias in zip(kernels, biases, strict=True)), gradients

    return products(*weights, *inputs)


def rows_at(states: tf.Tensor, places: tf.Tensor) -> tf.Tensor:
    """Some of the rows (B, T, D), those at places (B, M) or (1, M): (B, M, D); NaN where no row is."""
    places = tf.broadcast_to(places, (shape_of(states)[0], shape_of(places)[1]))
    there = is_place(places, states, 1)
    return tf.where(there[..., None], tf.gather(states, tf.where(there, places, 0), batch_dims=1), math.nan)


def is_place(places: tf.Tensor, tensor: tf.Tensor, axis: int) -> tf.Tensor:
    """Which of the places a tensor has along an axis."""
    return (places >= 0) & (places < tf.shape(tensor, places.dtype)[axis])


def in_xla() -> bool:
    """Whether XLA compiles what is traced, which it can for tensors of known shapes only; True if that is not known."""
    if tf.executing_eagerly():
        return False
    try:
        from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext
    except ImportError:
        return True
    return GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def is_own(layer: keras.layers.Layer) -> bool:
    """Whether a layer is one of these, and not a user's in its place, which may compute something else."""
    return type(layer) in (Dense, LayerNorm)


def later(tensor: tf.Tensor, *upstream: tf.Tensor) -> tf.Tensor:
    """A tensor for the backward pass to compute with, not before its gradient has come; TensorFlow would begin at once,
    and keep the results."""
    with tf.control_dependencies(upstream):
        return tf.identity(tensor)


def sum_of_rows(x: tf.Tensor) -> tf.Tensor:
    """(..., D) -> (D,), in half the time that `tf.reduce_sum` takes for it."""
    return tf.raw_ops.BiasAddGrad(out_backprop=x if x.shape.rank == 2 else tf.reshape(x, (-1, x.shape[-1])))


def linear(
    inputs: tf.Tensor,
    kernel: tf.Tensor,
    bias: tf.Tensor | None,
    transpose: bool = False,
    activation: Callable[[tf.Tensor], tf.Tensor] | None = None,
) -> tf.Tensor:
    """activation(inputs kernel + bias) over the last axis, as one product of matrices.

    TensorFlow fuses the rest with the product as long as nothing comes between them, here the last reshape. That saves
    a pass over memory in float32; in 16 bits the fused product takes longer, up to twice as long, than both by
    themselves.
    """
    *lengths, size = shape_of(inputs)
    outputs = tf.matmul(tf.reshape(inputs, (-1, size)), kernel, transpose_b=transpose)
    fuses = outputs.dtype.size > 2
    outputs = outputs if fuses else tf.reshape(outputs, (*lengths, outputs.shape[-1]))
    outputs = outputs if bias is None else tf.nn.bias_add(outputs, bias)
    outputs = outputs if activation is None else activation(outputs)
    return tf.reshape(outputs, (*lengths, outputs.shape[-1])) if fuses else outputs


def shape_of(tensor: tf.Tensor) -> list[int | tf.Tensor]:
    """Lengths of the axes: numbers where they are known while tracing, tensors where they are not."""
    if tensor.shape.is_fully_defined():
        return list(tensor.shape)
    lengths = tf.unstack(tf.shape(tensor))
    return [found if known is None else known for known, found in zip(tensor.shape, lengths, strict=True)]


def at_least_float32(dtype: tf.DType) -> tf.DType:
    """The dtype that sums over many elements are made in."""
    return tf.float64 if dtype == tf.float64 else tf.float32
