"""One optimizer step after another on a model; `roberta_pln/training` says which, and when."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from roberta_pln.backends import BACKENDS
from roberta_pln.checks import InputError
from roberta_pln.config import RobertaPreLayerNormConfig
from roberta_pln.data.batches import Arrays
from roberta_pln.numerics import IGNORE_INDEX
from roberta_pln.schema import LM_HEADS
from roberta_pln.tf import weights
from roberta_pln.tf.layers import at_least_float32, seeded_apart
from roberta_pln.tf.losses import next_labels
from roberta_pln.tf.optimizers import AdamW
from roberta_pln.tf.pretrained import RobertaPreLayerNormPreTrainedModel
from roberta_pln.training.recipe import CLIP_EPSILON, Recipe
from roberta_pln.training.shares import LABELS, counted, share_out
from roberta_pln.training.state import Snapshot, Tensors

POLICIES = {"float32": "float32", "bfloat16": "mixed_bfloat16", "float64": "float64"}
"""The dtype that a model is made with, by the recipe's precision."""

NUMBER, WHOLE_NUMBER = tf.TensorSpec((), tf.float64), tf.TensorSpec((), tf.int64)


class Trainer:
    """A model, and the optimizer that trains it.

    Args:
        model: one of this package, made in the strategy's scope with the dtype that `POLICIES` has for the recipe.
        recipe: how weights follow gradients.
        strategy: how devices share out the rows of a batch: a `tf.distribute.MirroredStrategy`, or in each of several
            processes a `MultiWorkerMirroredStrategy`. None is the one whose scope this is in, or else one device.

    Raises:
        InputError: when the model was made with another dtype, or outside of the scope.
    """

    fixed_shapes = False
    """Whether every new shape of a batch costs time once."""

    def __init__(
        self,
        model: RobertaPreLayerNormPreTrainedModel,
        recipe: Recipe,
        strategy: tf.distribute.Strategy | None = None,
    ) -> None:
        self.model, self.recipe, self.steps = model, recipe, 0
        self.strategy = strategy or tf.distribute.get_strategy()
        self.parameters = model.parameters_of_schema
        self.variables = [weights.get(model, parameter) for parameter in self.parameters.values()]
        self._check()
        if recipe.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        if recipe.freeze:
            model.freeze(*recipe.freeze)
        with self.strategy.scope():  # the rate is given at every step
            self.optimizer = AdamW(0.0, recipe.weight_decay, recipe.beta_1, recipe.beta_2, recipe.epsilon)
            kept = [variable for variable in self.variables if not recipe.decays(tuple(variable.shape))]
            self.optimizer.exclude_from_weight_decay(kept)
            self.optimizer.build(self.variables)
        # The number of a replica among all of all processes, as `run` gives each its own, and those of this process.
        self.number = self.strategy.experimental_distribute_values_from_function(
            lambda context: context.replica_id_in_sync_group
        )
        self.numbers = self.strategy.experimental_local_results(self.number)
        self._programs: dict[Any, Callable] = {}
        self._moving = set(range(len(self.variables)))  # numbers of the parameters that may have moments

    @classmethod
    def build(
        cls, config: RobertaPreLayerNormConfig, head: str, recipe: Recipe, parallel: str | None = None
    ) -> "Trainer":
        """A trainer for a new model, whose weights `restore` is to bring.

        Args:
            config: the model's.
            head: one of `schema.HEADS`.
            recipe: how weights follow gradients.
            parallel: `mirrored` is all GPUs of this process, or all processors that TensorFlow sees; `multiworker` is
                those of all processes that TF_CONFIG tells of, and has to come before anything else that TensorFlow
                does. None is one device.

        Raises:
            InputError: when `parallel` is not one of these, or nothing says which processes there are.
        """
        strategy = strategy_of(parallel)
        with strategy.scope(), weights.left_blank():
            model = BACKENDS["tf"].model_class(head)(config, seed=recipe.seed, dtype=POLICIES[recipe.precision])
        return cls(model, recipe, strategy)

    @property
    def is_main(self) -> bool:
        """Whether this process writes what all of them have made."""
        return 0 in self.numbers

    def wait(self) -> None:
        """Return when all processes have come here."""
        if len(self.numbers) < self.strategy.num_replicas_in_sync:
            self._program(self._meet, {})().numpy()

    def step(self, batch: Arrays, rate: float) -> tf.Tensor:
        """Take one step.

        Args:
            batch: arguments of the model with labels, in NumPy, of all devices together.
            rate: the learning rate.

        Returns:
            The loss of the whole batch before the step, () of this framework; it may still be computed when this
            returns, and `float` waits for it.
        """
        count = self.recipe.accumulation
        shares = share_out(batch, count * self.strategy.num_replicas_in_sync, self.model.head)
        seeded = [(*share, self.recipe.dropout_seed(self.steps, part)) for part, share in enumerate(shares)]
        own = [seeded[number * count : (number + 1) * count] for number in self.numbers]
        loss = self._program(self._step, batch, self._trained())(own, rate, self.steps)
        self.steps += 1
        return loss

    def predict(self, batch: Arrays) -> Arrays:
        """What the model says of every row of a batch, in evaluation mode, on every process.

        Returns:
            The logits by their names, at least float32; of a language model, which needs labels, instead for each
            label `losses`, float, -log softmax(logits)[label], and `best`, the index of the highest logit, both of the
            shape of the labels, zero where there is none.
        """
        if self.model.head in LM_HEADS:
            if "labels" not in batch:
                raise InputError(f"to predict, a language model must have labels, got {', '.join(batch)}")
            batch = {**batch, "labels": counted(batch, self.model.head)}
        count, replicas = len(batch["input_ids"]), self.strategy.num_replicas_in_sync
        rows = np.resize(np.arange(count), (replicas, -(-count // replicas)))  # as many for each; some come twice
        own = [{name: array[rows[number]] for name, array in batch.items()} for number in self.numbers]
        found = self._program(self._predict, batch)(own)
        return {name: array.numpy()[:count] for name, array in found.items()}

    def snapshot(self) -> Snapshot:
        """The state in canonical tensors, on every process; all of them call it together."""
        self._trained()
        return Snapshot(self.steps, *map(self._canonical, self._state()))

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a state.

        Raises:
            InputError: when it is that of another head or config.
        """
        snapshot.require(self.parameters)
        self.steps, self._moving = snapshot.step, set(range(len(self.variables)))
        for tensors, variables in zip((snapshot.weights, snapshot.first, snapshot.second), self._state(), strict=True):
            for (name, parameter), variable in zip(self.parameters.items(), variables, strict=True):
                array = tensors[name].T if parameter.leaf.transposed else tensors[name]
                variable.assign(np.array(array, variable.dtype))  # a copy: steps write into the memory of arrays

    # ------------------------------------------------------------- what is compiled, for arrays of all lengths

    def _program(self, make: Callable[..., Callable], arrays: Arrays, *settings: Any) -> Callable:
        """What `make` makes for arrays of such names, dtypes and numbers of axes."""
        kinds = {name: (array.dtype, array.ndim) for name, array in arrays.items()}
        key = make.__name__, *sorted(kinds.items()), *settings
        if key not in self._programs:
            specs = {name: tf.TensorSpec([None] * axes, dtype) for name, (dtype, axes) in kinds.items()}
            self._programs[key] = make(specs, *settings)
        return self._programs[key]

    def _step(self, arrays: dict[str, tf.TensorSpec], trained: tuple[int, ...]) -> Callable:
        """What takes the shares of this process's replicas, the rate, and the number of steps before this one."""
        share = arrays, NUMBER, WHOLE_NUMBER
        # Inlined, the parts of an accumulation would not wait for each other, and need the memory of all.
        gradients = compiled(partial(self._gradients, trained), share, _noinline=True)

        def replica(number: int, shares: Sequence, rate: tf.Tensor) -> tf.Tensor:
            total: list[tf.Tensor] = []
            for part in shares[number - self.numbers[0]]:
                with tf.control_dependencies(total):
                    found = gradients(*part)
                total = [a + b for a, b in zip(total, found, strict=True)] if total else found
            loss, *total = added_up(total)
            self._update(dict(zip(trained, total, strict=True)), rate)
            return loss

        def step(shares: Sequence, rate: tf.Tensor, before: tf.Tensor) -> tf.Tensor:
            self.optimizer.iterations.assign(before)
            return self._of_one(self.strategy.run(replica, (self.number, shares, rate)))

        shares = [[share] * self.recipe.accumulation] * len(self.numbers)
        return compiled(step, (shares, NUMBER, WHOLE_NUMBER))

    def _gradients(
        self, trained: tuple[int, ...], arrays: dict[str, tf.Tensor], weight: tf.Tensor, seed: tf.Tensor
    ) -> list[tf.Tensor]:
        """What a share adds to the loss of the batch, and to the gradient of every parameter that is trained."""
        self.model.seed_generator.state.assign(tf.stack((seed, 0)))
        token = seeded_apart.set(True)
        try:
            with tf.GradientTape() as tape:
                loss = self.model(**arrays, training=True, return_dict=True).loss
                loss *= tf.cast(weight, loss.dtype)
            variables = [self.variables[number].value for number in trained]
            found = tape.gradient(loss, variables, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        finally:
            seeded_apart.reset(token)
        return [loss, *map(tf.convert_to_tensor, found)]

    def _update(self, gradients: dict[int, tf.Tensor], rate: tf.Tensor) -> None:
        """Move the parameters of a replica along their gradients, clipped."""
        if self.recipe.clip is not None:
            norm = tf.linalg.global_norm(list(gradients.values()))
            scale = tf.minimum(self.recipe.clip / (norm + CLIP_EPSILON), 1)
            gradients = {number: gradient * scale for number, gradient in gradients.items()}
        common = self.optimizer.common([self.variables[number] for number in gradients], rate)
        for number, gradient in gradients.items():
            self.optimizer.update_step(gradient, self.variables[number], common)

    def _predict(self, arrays: dict[str, tf.TensorSpec]) -> Callable:
        """What takes the rows of this process's replicas."""

        def replica(number: int, shares: Sequence) -> dict[str, tf.Tensor]:
            context = tf.distribute.get_replica_context()
            said = says(self.model, shares[number - self.numbers[0]])
            return {name: context.all_gather(value, axis=0) for name, value in said.items()}

        def predict(shares: Sequence) -> dict[str, tf.Tensor]:
            said = self.strategy.run(replica, (self.number, shares))
            return {name: self._of_one(value) for name, value in said.items()}

        return compiled(predict, [[arrays] * len(self.numbers)])

    def _meet(self, _: Any) -> Callable:
        """What has to hear of all replicas."""
        return compiled(lambda: self._of_one(self.strategy.run(lambda: added_up(tf.ones(())))))

    def _of_one(self, value: Any) -> tf.Tensor:
        """What all replicas have found alike."""
        return self.strategy.experimental_local_results(value)[0]

    # ------------------------------------------------------------- parameters and moments

    def _state(self) -> tuple[Sequence[keras.Variable], ...]:
        """Parameters and their two moments, in the order of the schema."""
        return self.variables, self.optimizer._momentums, self.optimizer._velocities

    def _trained(self) -> tuple[int, ...]:
        """The numbers of the parameters that are trained now. The others lose their moments."""
        trained = tuple(number for number, variable in enumerate(self.variables) if variable.trainable)
        for number in self._moving.difference(trained):
            for moments in self._state()[1:]:
                moments[number].assign(tf.zeros_like(moments[number]))
        self._moving = set(trained)
        return trained

    def _canonical(self, variables: Sequence[keras.Variable]) -> Tensors:
        arrays = {name: variable.numpy() for name, variable in zip(self.parameters, variables, strict=True)}
        return {name: array.T if self.parameters[name].leaf.transposed else array for name, array in arrays.items()}

    def _check(self) -> None:
        policy, wanted = self.model.dtype_policy.name, POLICIES[self.recipe.precision]
        if policy != wanted:
            raise InputError(
                f"a model that is trained with precision {self.recipe.precision!r} must be made with dtype={wanted!r}, "
                f"got {policy!r}: make it so, or give the recipe another precision"
            )
        if not all(self.strategy.extended.variable_created_in_scope(variable.value) for variable in self.variables):
            raise InputError(
                f"the model must be made in the scope of the strategy that trains it, got one that was made outside of "
                f"that of this {type(self.strategy).__name__}: make it within `with strategy.scope():`"
            )


def strategy_of(parallel: str | None) -> tf.distribute.Strategy:
    """What the texts for `Trainer.build` mean."""
    if parallel is None:
        return tf.distribute.get_strategy()
    if parallel == "mirrored":
        devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
        return tf.distribute.MirroredStrategy([device.name for device in devices])
    if parallel != "multiworker":
        raise InputError(f"parallel must be mirrored or multiworker, or None for one device, got {parallel!r}")
    if "TF_CONFIG" not in os.environ:
        raise InputError(
            "parallel='multiworker' needs to know its processes, got no TF_CONFIG in the environment: set it in each, "
            """as in '{"cluster": {"worker": ["one:2222", "two:2222"]}, "task": {"type": "worker", "index": 0}}'"""
        )
    return tf.distribute.MultiWorkerMirroredStrategy()


def compiled(function: Callable, signature: Sequence = (), **attributes: Any) -> Callable:
    """A function as a graph; none here has control flow of Python that depends on tensors."""
    return tf.function(function, input_signature=signature, autograph=False, experimental_attributes=attributes)


def added_up(values: Any) -> Any:
    """The sums over all replicas of what each has."""
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, values)


def says(model: RobertaPreLayerNormPreTrainedModel, arrays: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """See `Trainer.predict`."""
    inputs = {name: value for name, value in arrays.items() if name not in LABELS}
    if model.head in LM_HEADS:
        return scores(model, inputs, arrays["labels"])
    record = model(**inputs, return_dict=True)
    return {name: tf.cast(record[name], at_least_float32(record[name].dtype)) for name in model.logits_names}


def scores(
    model: RobertaPreLayerNormPreTrainedModel, inputs: dict[str, tf.Tensor], labels: tf.Tensor
) -> dict[str, tf.Tensor]:
    """The `losses` and `best` of a language model, see `Trainer.predict`; for (B, T) labels both (B, T).

    Only what has a label is decoded: all logits would take more memory than a step of training.
    """
    causal, base = model.head == "ForCausalLM", model.roberta_prelayernorm
    targets = next_labels(labels) if causal else labels
    places = tf.where(targets != IGNORE_INDEX)  # (M, 2)
    states = tf.gather_nd(base(**inputs, use_cache=False, return_dict=True).last_hidden_state, places)  # (M, D)
    logits = model.lm_head(states, base.embeddings.word_embeddings.embeddings.value)  # (M, V)
    logits = tf.cast(logits, at_least_float32(logits.dtype))
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.gather_nd(targets, places), logits)
    found = {"losses": losses, "best": tf.argmax(logits, axis=-1)}
    found = {name: tf.scatter_nd(places, value, tf.shape(targets, tf.int64)) for name, value in found.items()}
    return {name: tf.roll(value, 1, axis=1) if causal else value for name, value in found.items()}
