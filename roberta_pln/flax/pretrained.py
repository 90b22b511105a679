"""What every model can do: load, save, count its parameters, read arguments."""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jax.typing import DTypeLike

from roberta_pln import checkpoint, checks, loading, schema
from roberta_pln.config import RobertaPreLayerNormConfig
from roberta_pln.flax import records, weights  # noqa: F401  records registers itself
from roberta_pln.flax.layers import Block
from roberta_pln.outputs import ModelOutput

NATIVE_FORMAT = "msgpack"
"""What `save_pretrained(safe_serialization=False)` writes."""

Params = Mapping[str, Any]
"""Nested dicts of arrays; their keys are the parts of the canonical names, with Flax's names for the leaves."""


class PreTrainedModule(Block):
    """Base of all models' Linen modules: what the module of a model is constructed with, and how it reads arguments.

    Args:
        config: sizes and switches, checked again here.
        dtype: type of the computation and of the results.
        param_dtype: type of the parameters.
        gradient_checkpointing: whether the backward pass computes each layer anew instead of keeping its insides.
    """

    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    gradient_checkpointing: bool = False

    def check(self) -> None:
        """Check the fields; the first step of every setup."""
        self.config.validate()
        floating(self.dtype)
        floating(self.param_dtype)

    def tensor(self, value: Any) -> Array | None:
        """An argument as an array; lists and other frameworks' tensors are converted."""
        return value if value is None or isinstance(value, jax.Array) else jnp.asarray(np.asarray(value))

    def states(self, value: Any) -> Array | None:
        """An argument of hidden states, in the type of the computation."""
        return None if value is None else self.tensor(value).astype(self.dtype)

    def ids(self, name: str, value: Any, *shapes: Iterable[int | None]) -> Array | None:
        """An argument of integers as an array of one of the allowed shapes, in the widest integer type that is on."""
        if value is None:
            return None
        limits = jnp.iinfo(jax.dtypes.canonicalize_dtype(np.int64))
        if not isinstance(value, jax.Array):
            value = np.asarray(value)
        checks.integer(name, str(value.dtype))
        if shapes:
            checks.shape(name, value.shape, *shapes)
        if isinstance(value, np.ndarray):  # in int32, ids beyond it would wrap into the table
            value = np.clip(value.astype(np.int64), limits.min, limits.max)
        return jnp.asarray(value, limits.dtype)

    def returned(self, record: ModelOutput, return_dict: bool | None) -> ModelOutput | tuple:
        """The record, or its tuple form if the call or the config asks for it."""
        as_record = self.config.return_dict if return_dict is None else return_dict
        return record if as_record else record.plain()


class RobertaPreLayerNormPreTrainedModel:
    """Base of all models: a Linen module with its parameters.

    Args:
        config: sizes and switches, checked again here.
        input_shape: shape of the ids that the module is initialised with; the parameters do not depend on it.
        seed: where fresh weights are drawn from.
        dtype: type of the computation and of the results.
        _do_init: `False` leaves the parameters unset; calls then need `params`.
        param_dtype: type of the parameters; `dtype` if not given.
        gradient_checkpointing: whether the backward pass computes each layer anew instead of keeping its insides.
        options: further fields of the module.

    Raises:
        ValueError: when `dtype` is no floating-point type, or `float64` while JAX is in its 32-bit mode.
    """

    config_class = RobertaPreLayerNormConfig
    base_model_prefix = schema.PREFIX
    framework = "flax"
    head: ClassVar[str]
    module_class: ClassVar[type[PreTrainedModule]]

    def __init__(
        self,
        config: RobertaPreLayerNormConfig,
        input_shape: tuple[int, ...] = (1, 1),
        seed: int = 0,
        dtype: DTypeLike = jnp.float32,
        _do_init: bool = True,
        param_dtype: DTypeLike | None = None,
        gradient_checkpointing: bool = False,
        **options: Any,
    ) -> None:
        config.validate()
        self.config = config
        self.dtype = floating(dtype)
        self.param_dtype = floating(dtype if param_dtype is None else param_dtype)
        self.key = jax.random.PRNGKey(seed)
        self.module = self.module_class(config, self.dtype, self.param_dtype, gradient_checkpointing, **options)
        self._params: dict[str, Any] | None = None
        weights.check(self, input_shape)
        if _do_init:
            self.params = self.init_weights(self.key, input_shape)

    def init_weights(
        self, rng: Array, input_shape: tuple[int, ...] = (1, 1), params: Params | None = None
    ) -> dict[str, Any]:
        """Fresh parameters, or `params` with fresh ones where some are missing.

        Args:
            rng: the key to draw from; the same key gives the same parameters.
            input_shape: what Linen's initialisation takes; no parameter depends on it.
            params: parameters to keep.
        """
        kept = flatten_dict(unfreeze(params or {}))
        missing = [p for p in self.parameters_of_schema.values() if weights.owner(self, p) not in kept]
        return unflatten_dict({**kept, **weights.initialize(self, missing, rng)})

    # ------------------------------------------------------------- load and save

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str] | checkpoint.Checkpoint,
        *,
        config: RobertaPreLayerNormConfig | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike | None = None,
        seed: int = 0,
        gradient_checkpointing: bool = False,
        _do_init: bool = True,
        output_loading_info: bool = False,
        **options: Any,
    ) -> Self | tuple[Any, ...]:
        """Load a model from any checkpoint of this architecture.

        Args:
            path: a directory, a single file, a hub id, or an open checkpoint.
            config: used instead of the one beside the weights.
            dtype: type of the computation and of the parameters: `float64`, `float32`, `bfloat16`, `float16` or `auto`
                (as saved); `float32` if not given.
            param_dtype: type of the parameters, if it is another; `float32` with `dtype="bfloat16"` is mixed precision.
            seed: where parameters that the checkpoint lacks are drawn from.
            gradient_checkpointing: see the constructor.
            _do_init: `False` returns the parameters beside the model, which then has none.
            output_loading_info: also return which parameters were missing, unexpected or mis-shaped.
            options: see `loading.prepare`: `ignore_mismatched_sizes`, `strict`, `add_pooling_layer`, the hub's
                keywords (`revision`, `cache_dir`, `token`, ...), and fields of the config to override.

        Returns:
            The model; with `_do_init=False` the model and its parameters; with `output_loading_info` followed by that.

        Raises:
            LoadError: naming every tensor that is missing, unexpected or mis-shaped.
            CheckpointError: when the file is cut short, no checkpoint, or of another architecture.
            ValueError: when `float64` is asked for while JAX is in its 32-bit mode.
        """
        loaded = loading.prepare(path, cls.head, config=config, dtype=dtype, **options)
        model = cls(
            loaded.config,
            seed=seed,
            dtype=loaded.dtype,
            _do_init=False,
            param_dtype=param_dtype,
            gradient_checkpointing=gradient_checkpointing,
            **loaded.constructor,
        )
        loaded = dataclasses.replace(loaded, dtype=model.param_dtype.name)
        arrays = weights.load(model, loaded.tensors()) | weights.initialize(model, loaded.fresh(), model.key)
        params = unflatten_dict(arrays)
        if _do_init:
            model.params = params
        returned = (model,) if _do_init else (model, params)
        returned += (loaded.info.to_dict(),) if output_loading_info else ()
        return returned if len(returned) > 1 else model

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        params: Params | None = None,
        *,
        format: str | None = None,
        safe_serialization: bool = True,
    ) -> None:
        """Write the weights and `config.json` into a directory; a failure leaves the files that were there whole.

        Args:
            directory: made if it is not there.
            params: written instead of the model's own parameters.
            format: one of `checkpoint.FORMATS`.
            safe_serialization: without `format`, `True` writes safetensors and `False` this framework's own format.
        """
        format = format or ("safetensors" if safe_serialization else NATIVE_FORMAT)
        params = self.params if params is None else params
        checkpoint.save(weights.dump(self, params), directory, self.config, self.head, format)

    # ------------------------------------------------------------- parameters

    @property
    def parameters_of_schema(self) -> dict[str, schema.Parameter]:
        """What the schema says about each parameter, by canonical name."""
        pooled = getattr(self.module, "add_pooling_layer", True)
        return schema.expand(self.config, self.head, add_pooling_layer=pooled)

    @property
    def params(self) -> dict[str, Any]:
        """The parameters.

        Raises:
            ValueError: when there are none, or those to be set are not those of the model.
        """
        if self._params is None:
            raise ValueError(
                "the model was made with _do_init=False and has no parameters: give params to the call, or set "
                "model.params (init_weights makes fresh ones)"
            )
        return self._params

    @params.setter
    def params(self, params: Params) -> None:
        params = unfreeze(params)
        given = flatten_dict(params).keys()
        problems = [f"missing: {'.'.join(path)}" for path in sorted(self.required_params - given)]
        problems += [f"unexpected: {'.'.join(path)}" for path in sorted(given - self.required_params)]
        if problems:
            raise ValueError(f"these are not the parameters of {type(self).__name__}:\n  " + "\n  ".join(problems))
        self._params = params

    @property
    def params_shape_tree(self) -> dict[str, Any]:
        """Shape and type of every parameter, nested as `params` are."""
        return unflatten_dict(weights.shapes(self))

    @property
    def required_params(self) -> set[tuple[str, ...]]:
        """The path of every parameter."""
        return set(weights.shapes(self))

    def num_parameters(self) -> int:
        """Number of parameters, shared ones counted once."""
        return sum(parameter.size for parameter in self.parameters_of_schema.values())

    def to_bf16(self, params: Params, mask: Params | None = None) -> Params:
        """A copy of the parameters in bfloat16; with a mask, a tree of booleans, only those where it is true."""
        return cast(params, jnp.bfloat16, mask)

    def to_fp16(self, params: Params, mask: Params | None = None) -> Params:
        """A copy of the parameters in float16; see `to_bf16`."""
        return cast(params, jnp.float16, mask)

    def to_fp32(self, params: Params, mask: Params | None = None) -> Params:
        """A copy of the parameters in float32; see `to_bf16`."""
        return cast(params, jnp.float32, mask)

    # ------------------------------------------------------------- calls

    def apply(self, params: Params | None, dropout_rng: Array | None, train: bool, *arguments: Any) -> Any:
        """Call the module.

        Raises:
            ValueError: when `train` is true and there is no `dropout_rng`.
        """
        if train and dropout_rng is None:
            raise ValueError("train=True applies dropout and needs its key: give dropout_rng=jax.random.key(...)")
        return self.module.apply(
            {"params": self.params if params is None else params},
            *arguments,
            deterministic=not train,
            rngs={"dropout": dropout_rng} if train else None,
        )


def floating(dtype: DTypeLike) -> jnp.dtype:
    """A type for computing, checked.

    Raises:
        ValueError: when it is no floating-point type, or `float64` while JAX is in its 32-bit mode.
    """
    dtype = jnp.dtype(loading.dtype_name(dtype))
    if dtype == jnp.float64 and not jax.config.jax_enable_x64:
        raise ValueError(
            "float64 needs JAX's 64-bit mode, which is off: call jax.config.update('jax_enable_x64', True) first, or "
            "set the environment variable JAX_ENABLE_X64=1"
        )
    return dtype


def cast(params: Params, dtype: DTypeLike, mask: Params | None) -> Params:
    """Parameters in another type, all or those where a tree of booleans is true."""
    if mask is None:
        return jax.tree.map(lambda array: array.astype(dtype), params)
    return jax.tree.map(lambda array, chosen: array.astype(dtype) if chosen else array, params, mask)
