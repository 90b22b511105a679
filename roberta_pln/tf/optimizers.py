"""The optimizer that trains as PyTorch's and optax's do."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from roberta_pln.tf.layers import at_least_float32

Rate = float | keras.optimizers.schedules.LearningRateSchedule | Callable[[], tf.Tensor]


class Factors(NamedTuple):
    """What the updates of all variables in a step have in common.

    Attributes:
        decay: share of a variable that it loses.
        rate: the learning rate behind the correction of the first moment.
        root: what corrects the root of the second moment.
        rate_of_root, epsilon_of_root: rate and epsilon times that, for a root that is not corrected.
        beta_1, beta_2, zero: constants.
    """

    decay: tf.Tensor
    rate: tf.Tensor
    root: tf.Tensor
    rate_of_root: tf.Tensor
    epsilon_of_root: tf.Tensor
    beta_1: tf.Tensor
    beta_2: tf.Tensor
    zero: tf.Tensor


@keras.saving.register_keras_serializable("roberta_pln")
class AdamW(keras.optimizers.AdamW):
    """AdamW as `torch.optim.AdamW` and `optax.adamw` have it: p -= rate * (m^ / (sqrt(v^) + epsilon) + decay * p).

    m^ and v^ are the moments after their bias correction. Keras' own class adds epsilon to sqrt(v) before it, has the
    rate, decay and betas in float32 whatever the model is in, takes the powers of the betas in the variable's dtype
    (in bfloat16, where 0.999 is 1, nothing moves), and squares and clips each slice of a gradient by itself, though
    several may be of one row. Here scalars are float64, moments are computed in at least float32, and slices are added
    up first.

    Args:
        learning_rate: a number, a schedule of Keras, which computes in float32, or a function.
        weight_decay: as a part of the rate; `exclude_from_weight_decay` takes variables out of it.
        beta_1, beta_2, epsilon: the constants of the moments. All defaults are PyTorch's.
        **options: those of `keras.optimizers.AdamW`: `amsgrad`, `global_clipnorm`, `gradient_accumulation_steps`, ...
    """

    def __init__(
        self,
        learning_rate: Rate = 0.001,
        weight_decay: float = 0.01,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        **options: Any,
    ) -> None:
        # TensorFlow reads a Python number as float32 before it casts it, and one of NumPy in its own precision.
        super().__init__(learning_rate, np.float64(weight_decay), beta_1, beta_2, epsilon, **options)
        if isinstance(self._learning_rate, keras.Variable):
            self._untrack_variable(self._learning_rate)
            self._learning_rate = keras.Variable(
                learning_rate,
                dtype="float64",
                trainable=False,
                aggregation="only_first_replica",
                name="learning_rate",
            )
            self._track_variable(self._learning_rate)

    def apply(
        self, grads: Sequence[tf.Tensor | tf.IndexedSlices | None], trainable_variables: Sequence[Any] | None = None
    ) -> None:
        """Update the variables, with dense gradients."""
        super().apply([None if grad is None else tf.convert_to_tensor(grad) for grad in grads], trainable_variables)

    def _apply_weight_decay(self, variables: Sequence[Any]) -> None:
        """Leave it to `update_step`: Keras lets all variables decay before the step, when it has no gradients yet."""

    def _backend_update_step(
        self, grads: Sequence[tf.Tensor | None], trainable_variables: Sequence[Any], learning_rate: tf.Tensor
    ) -> None:
        """Update the variables with what all updates have in common."""
        super()._backend_update_step(grads, trainable_variables, self.common(trainable_variables, learning_rate))

    def common(self, variables: Sequence[tf.Variable], learning_rate: tf.Tensor) -> dict[str, Factors]:
        """What the updates of these variables in this step have in common, by the dtype that each computes in."""
        dtypes = {at_least_float32(tf.as_dtype(variable.dtype)) for variable in variables}
        return {dtype.name: self.factors(learning_rate, dtype) for dtype in dtypes}

    def factors(self, learning_rate: tf.Tensor, dtype: tf.DType) -> Factors:
        """What the updates of this step have in common, computed in float64."""
        rate, step = tf.cast(learning_rate, tf.float64), tf.cast(self.iterations + 1, tf.float64)
        correction_1, correction_2 = (1 - tf.constant(beta, tf.float64) ** step for beta in (self.beta_1, self.beta_2))
        decay, rate, root = rate * (self.weight_decay or 0.0), rate / correction_1, tf.sqrt(correction_2)
        computed = (tf.cast(number, dtype) for number in (decay, rate, root, rate * root, self.epsilon * root))
        return Factors(*computed, *(tf.constant(number, dtype) for number in (self.beta_1, self.beta_2, 0)))

    def update_step(
        self, gradient: tf.Tensor, variable: tf.Variable, learning_rate: tf.Tensor | dict[str, Factors]
    ) -> None:
        """Let one variable decay, and move it.

        Args:
            gradient: of the variable's shape.
            variable: one that the optimizer was built for.
            learning_rate: the rate, or what `common` makes of it, which by itself each update computes.
        """
        dtype, index = at_least_float32(variable.dtype), self._get_variable_index(variable)
        if not isinstance(learning_rate, dict):
            learning_rate = self.common([variable], learning_rate)
        common = learning_rate[dtype.name]
        if self.weight_decay and self._use_weight_decay(variable):
            self._decay(variable, common.decay, gradient)
        first, second = self._momentums[index], self._velocities[index]

        gradient = tf.cast(gradient, dtype)
        if not self.amsgrad and variable.dtype == first.dtype == dtype:  # one pass over memory, not a dozen
            tf.raw_ops.ResourceApplyAdam(
                var=variable.handle,
                m=first.value.handle,
                v=second.value.handle,
                beta1_power=common.zero,  # too coarse in float32: the rate and epsilon have them in
                beta2_power=common.zero,
                lr=common.rate_of_root,
                beta1=common.beta_1,
                beta2=common.beta_2,
                epsilon=common.epsilon_of_root,
                grad=gradient,
            )
            return
        m, v = tf.cast(first, dtype), tf.cast(second, dtype)
        m = m + (gradient - m) * (1 - self.beta_1)
        v = v + (tf.square(gradient) - v) * (1 - self.beta_2)
        self.assign(first, m)
        self.assign(second, v)
        if self.amsgrad:
            v = tf.maximum(tf.cast(self._velocity_hats[index], dtype), v)
            self.assign(self._velocity_hats[index], v)
        denominator = tf.sqrt(v) / common.root + self.epsilon
        self.assign(variable, tf.cast(variable, dtype) - common.rate * m / denominator)

    def _decay(self, variable: tf.Variable, share: tf.Tensor, gradient: tf.Tensor) -> None:
        """Take a share of a variable away, once its gradient is there.

        Earlier its old values would stay in memory beside the new ones, since the backward pass still needs them.
        """
        with tf.control_dependencies([gradient]):
            value = tf.raw_ops.ReadVariableOp(resource=variable.handle, dtype=variable.dtype)
            tf.raw_ops.AssignSubVariableOp(resource=variable.handle, value=value * tf.cast(share, value.dtype))
