"""One optimizer step after another on a model; `roberta_pln/training` says which, and when."""

import math
from functools import partial
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from roberta_pln import checks
from roberta_pln.backends import BACKENDS
from roberta_pln.checks import InputError
from roberta_pln.config import RobertaPreLayerNormConfig
from roberta_pln.data.batches import Arrays
from roberta_pln.flax import sharding, weights
from roberta_pln.flax.layers import at_least_float32
from roberta_pln.flax.pretrained import Params, PreTrainedModule, RobertaPreLayerNormPreTrainedModel, floating
from roberta_pln.numerics import IGNORE_INDEX
from roberta_pln.schema import LM_HEADS
from roberta_pln.training.recipe import CLIP_EPSILON, Recipe
from roberta_pln.training.shares import LABELS, counted, share_out
from roberta_pln.training.state import Snapshot, Tensors, start

AXES: Final = ("data", "fsdp", "tensor")
"""Axes that a mesh may have."""

ROWS: Final = ("data", "fsdp")
"""Those that share out the rows of a batch."""

STORED: Final = {"hidden_size": "fsdp"}
"""How parameters and moments are shared out between the steps, beside `USED`; see `sharding.Rules`."""

USED: Final = dict.fromkeys(("attention_size", "intermediate_size", "activated_size", "vocab_size"), "tensor")
"""How parameters are shared out while they are used."""

Sums = tuple[Array, Params]
"""The loss of some parts of a batch and its gradient."""

State = tuple[Params, Params, Params]
"""Parameters, and AdamW's two moments of each."""


class Trainer:
    """A model, and the optimizer that trains it.

    Args:
        model: one of this package; its parameters become float32, or float64, as the recipe says.
        recipe: how weights follow gradients.
        mesh: devices, of one process or of several, in axes of `data`, `fsdp` and `tensor`: the first two share out the
            rows of a batch, the last two parameters and moments, as far as they divide. None is one device.

    Raises:
        ValueError: for `float64` while JAX is in its 32-bit mode.
        InputError: when the mesh has another axis.
    """

    fixed_shapes = True
    """Whether every new shape of a batch costs time once."""

    def __init__(self, model: RobertaPreLayerNormPreTrainedModel, recipe: Recipe, mesh: Mesh | None = None) -> None:
        self.model, self.recipe, self.steps = model, recipe, 0
        model.dtype, model.param_dtype = floating(recipe.precision), floating(recipe.parameter_dtype)
        types: dict[str, Any] = dict(dtype=model.dtype, param_dtype=model.param_dtype)
        model.module = model.module.clone(gradient_checkpointing=recipe.gradient_checkpointing, **types)
        self.mesh = Mesh(np.array(jax.local_devices()[:1]), ROWS[:1]) if mesh is None else mesh
        if unknown := sorted(set(self.mesh.shape) - set(AXES)):
            raise InputError(f"a mesh must have axes of {', '.join(AXES)}, got {', '.join(unknown)}: name them so")
        self.whole = NamedSharding(self.mesh, PartitionSpec())
        self.stored, self.used = self.shardings({**STORED, **USED}), self.shardings(USED)
        compiled = partial(jax.jit, static_argnames="frozen")
        self._zeros = jax.jit(self._nothing, out_shardings=(self.whole, self.stored))
        self._add = compiled(self._gradient, donate_argnums=1, out_shardings=(self.whole, self.stored))
        self._move = compiled(self._update, donate_argnums=0, out_shardings=(self.stored,) * 3)
        self._predict, self._score = (
            jax.jit(function, out_shardings=self.whole) for function in (self._logits, self._scores)
        )
        if model._params is not None:
            self.restore(start(weights.dump(model, model.params)))

    @classmethod
    def build(
        cls, config: RobertaPreLayerNormConfig, head: str, recipe: Recipe, parallel: str | None = None
    ) -> "Trainer":
        """A trainer for a new model, whose weights `restore` is to bring.

        Args:
            config: the model's.
            head: one of `schema.HEADS`.
            recipe: how weights follow gradients.
            parallel: a mesh of all devices, such as `data=2,fsdp=2,tensor=2`, see the class; None is one device. They
                are those of several processes where JAX_COORDINATOR_ADDRESS is set, and JAX_NUM_PROCESSES and
                JAX_PROCESS_ID, unless JAX knows the cluster.

        Raises:
            InputError: when `parallel` is something else.
        """
        mesh = None if parallel is None else sharding.mesh_of(parallel, AXES)
        return cls(BACKENDS["flax"].model_class(head)(config, _do_init=False), recipe, mesh)

    @property
    def is_main(self) -> bool:
        """Whether this process writes what all of them have made."""
        return jax.process_index() == 0

    def wait(self) -> None:
        """Return when all processes have come here."""
        multihost_utils.sync_global_devices("roberta_pln")

    def step(self, batch: Arrays, rate: float) -> Array:
        """Take one step.

        Args:
            batch: arguments of the model with labels, in NumPy, of all devices together.
            rate: the learning rate.

        Returns:
            The loss of the whole batch before the step, () of this framework; it may still be computed when this
            returns, and `float` waits for it.
        """
        recipe, frozen = self.recipe, frozenset(self.model.frozen)
        sums = self._zeros(self.model.params) if recipe.accumulation > 1 else None
        for part, share in enumerate(share_out(batch, recipe.accumulation, self.model.head)):
            seed = np.uint32(recipe.dropout_seed(self.steps, part))
            sums = self._add(self.model.params, sums, self.rows(share.arrays), share.weight, seed, frozen=frozen)
        loss, gradient = sums
        self.steps += 1
        unbiased = 1 - recipe.beta_1**self.steps, 1 - recipe.beta_2**self.steps
        state = self._move((self.model.params, self._first, self._second), gradient, rate, unbiased, frozen=frozen)
        self.model._params, self._first, self._second = state
        return loss

    def predict(self, batch: Arrays) -> Arrays:
        """What the model says of every row of a batch, in evaluation mode, on every process.

        Returns:
            The logits by their names, at least float32; of a language model, which needs labels, instead for each
            label `losses`, float, -log softmax(logits)[label], and `best`, the index of the highest logit, both of the
            shape of the labels, zero where there is none.
        """
        inputs = self.rows({name: array for name, array in batch.items() if name not in LABELS})
        if self.model.head not in LM_HEADS:
            return jax.tree.map(np.asarray, self._predict(self.model.params, inputs))
        if "labels" not in batch:
            raise InputError(f"to predict, a language model must have labels, got {', '.join(batch)}")
        labels, ahead = counted(batch, self.model.head), int(self.model.head == "ForCausalLM")
        at = rows, columns = np.nonzero(labels[:, ahead:] != IGNORE_INDEX)
        tokens = {"rows": rows, "columns": columns, "labels": labels[:, ahead:][at]}
        if len(rows):
            lowest, highest = int(tokens["labels"].min()), int(tokens["labels"].max())
            checks.labels_in_range("labels", lowest, highest, self.model.config.vocab_size, IGNORE_INDEX)
        size = min(labels.size, 1 << max(0, len(rows) - 1).bit_length())  # of few sizes, as each is compiled
        tokens = self.rows({name: np.pad(array, (0, size - len(rows))) for name, array in tokens.items()})
        found = jax.tree.map(np.asarray, self._score(self.model.params, inputs, tokens))
        arrays = {name: np.zeros(labels.shape, array.dtype) for name, array in found.items()}
        for name, array in found.items():
            arrays[name][:, ahead:][at] = array[: len(rows)]
        return arrays

    def snapshot(self) -> Snapshot:
        """The state in canonical tensors, on every process; all of them call it together."""
        state = self.model.params, self._first, self._second
        return Snapshot(
            self.steps, *(weights.dump(self.model, jax.tree.map(sharding.gathered, tree)) for tree in state)
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a state.

        Raises:
            InputError: when it is that of another head or config.
        """
        snapshot.require(self.model.parameters_of_schema)
        self.steps = snapshot.step
        self.model.params = self.placed(snapshot.weights)
        self._first, self._second = self.placed(snapshot.first), self.placed(snapshot.second)

    # ------------------------------------------------------------- what is compiled

    def _nothing(self, params: Params) -> Sums:
        """What the parts of a batch are added to."""
        return jnp.zeros((), self.model.param_dtype), jax.tree.map(jnp.zeros_like, params)

    def _gradient(
        self, params: Params, sums: Sums | None, arrays: Arrays, weight: Array, seed: Array, frozen: frozenset[str]
    ) -> Sums:
        """Loss and gradient of one part of a batch, times its weight, on top of those of the parts before it.

        Args:
            params: the parameters.
            sums: what this returned for the part before, zeros for the first, or None if there is one part only.
            arrays: arguments of the model.
            weight: (), of the part.
            seed: (), what dropout is drawn from.
            frozen: those of the model, whose gradients are zero; an argument, so that JAX compiles for each set.
        """

        def loss(params: Params) -> Array:
            kept = jax.tree.map(lambda x, trained: x if trained else jax.lax.stop_gradient(x), params, mask)
            options: dict[str, Any] = dict(dropout_rng=jax.random.key(seed), train=True, return_dict=True)
            return weight * self.model(**arrays, params=self._used(kept), **options).loss

        mask = self.model.trainable_mask()
        found = jax.value_and_grad(loss)(params)
        return found if sums is None else jax.tree.map(jnp.add, sums, found)

    def _update(
        self, state: State, gradient: Params, rate: Array, unbiased: tuple[Array, Array], frozen: frozenset[str]
    ) -> State:
        """Parameters and moments behind a step.

        Args:
            state: those before it.
            gradient: of the whole batch.
            rate: (), the learning rate.
            unbiased: (), what each moment is divided by, 1 - beta ** (number of the step).
            frozen: see `_gradient`.
        """
        recipe = self.recipe

        def moved(p: Array, m: Array, v: Array, g: Array, trained: bool) -> tuple[Array, Array, Array]:
            if not trained:
                return p, jnp.zeros_like(m), jnp.zeros_like(v)
            m = recipe.beta_1 * m + (1 - recipe.beta_1) * g
            v = recipe.beta_2 * v + (1 - recipe.beta_2) * jnp.square(g)
            change = m / unbiased[0] / (jnp.sqrt(v / unbiased[1]) + recipe.epsilon)
            decay = recipe.weight_decay if recipe.decays(p.shape) else 0.0
            return p - rate * (change + decay * p), m, v

        if recipe.clip is not None:
            norm = jnp.sqrt(sum(jnp.square(g).sum() for g in jax.tree.leaves(gradient)))
            scale = jnp.minimum(1, recipe.clip / (norm + CLIP_EPSILON))
            gradient = jax.tree.map(lambda g: scale * g, gradient)
        moves = jax.tree.map(moved, *state, gradient, self.model.trainable_mask())
        return jax.tree.transpose(jax.tree.structure(gradient), jax.tree.structure((0,) * 3), moves)

    def _logits(self, params: Params, arrays: Arrays) -> dict[str, Array]:
        """The logits by their names."""
        record = self.model(**arrays, params=self._used(params), return_dict=True)
        return {name: x.astype(at_least_float32(x.dtype)) for name, x in record.items() if name.endswith("logits")}

    def _scores(self, params: Params, arrays: Arrays, tokens: Arrays) -> dict[str, Array]:
        """See `scores`."""
        return self.model.module.apply({"params": self._used(params)}, arrays, **tokens, method=scores)

    def _used(self, params: Params) -> Params:
        """Parameters as a pass through the model has them; where they are stored is not for activations to follow."""
        return jax.lax.with_sharding_constraint(params, self.used)

    # ------------------------------------------------------------- where arrays are

    def shardings(self, rules: sharding.Rules) -> Params:
        """The sharding of every parameter, by the rules that fit."""
        specs = self.model.partition_specs(self.mesh, sharding.fitting(self.model, self.mesh, rules))
        return jax.tree.map(partial(NamedSharding, self.mesh), specs)

    def rows(self, arrays: Arrays) -> dict[str, Array]:
        """Arrays of as many rows, which are shared out; where they do not divide, every device has them all."""
        over = tuple(axis for axis in ROWS if axis in self.mesh.shape)
        uneven = len(next(iter(arrays.values()))) % math.prod(self.mesh.shape[axis] for axis in over)
        shared = self.whole if uneven else NamedSharding(self.mesh, PartitionSpec(over))
        return {name: sharding.place(array, shared) for name, array in arrays.items()}

    def placed(self, tensors: Tensors) -> Params:
        """Canonical tensors as this framework's arrays, where they are stored."""
        arrays = {}
        for name, parameter in self.model.parameters_of_schema.items():
            path = weights.owner(self.model, parameter)
            array = np.asarray(tensors[name], self.model.param_dtype)
            array = array.T if parameter.leaf.transposed else array
            arrays[path] = sharding.place(array, weights.get(self.stored, path))
        return unflatten_dict(arrays)


def scores(module: PreTrainedModule, inputs: Arrays, rows: Array, columns: Array, labels: Array) -> dict[str, Array]:
    """The `losses` and `best` of a language model, see `Trainer.predict`; for M tokens (M,).

    Only those tokens are decoded: all logits would take more memory than a step of training.
    """
    base = module.roberta_prelayernorm
    states = base(**inputs, return_dict=True).last_hidden_state[rows, columns]  # (M, D)
    logits = module.lm_head(states, base.embeddings.word_embeddings.embedding)  # (M, V)
    logits = logits.astype(at_least_float32(logits.dtype))
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1)[:, 0]
    return {"losses": losses, "best": logits.argmax(-1)}
