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
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike

from roberta_pln import checkpoint, checks, keywords, loading, paths, schema, surgery
from roberta_pln.config import RobertaPreLayerNormConfig
from roberta_pln.flax import records, sharding, weights  # noqa: F401  records registers itself
from roberta_pln.flax.layers import Block
from roberta_pln.generation import GenerationConfig
from roberta_pln.outputs import ModelOutput
from roberta_pln.paths import Path

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
        checks.switches(return_dict=as_record)
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
        checks.own_config(config)
        config.validate()
        self.config = config
        self.dtype = floating(dtype)
        self.param_dtype = floating(dtype if param_dtype is None else param_dtype)
        self.key = jax.random.PRNGKey(seed)
        self.module = self.module_class(config, self.dtype, self.param_dtype, gradient_checkpointing, **options)
        self._params: dict[str, Any] | None = None
        self.frozen: set[str] = set()
        self.generation_config = GenerationConfig.from_model_config(config) if self.head == "ForCausalLM" else None
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
        weights.check(self, input_shape)
        kept = flatten_dict(unfreeze(params or {}))
        missing = [p for p in self.parameters_of_schema.values() if weights.owner(self, p) not in kept]
        return unflatten_dict({**kept, **weights.initialize(self, missing, rng)})

    # ------------------------------------------------------------- load and save

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | checkpoint.Checkpoint,
        dtype: DTypeLike | None = None,
        *,
        config: RobertaPreLayerNormConfig | str | os.PathLike[str] | None = None,
        param_dtype: DTypeLike | None = None,
        seed: int = 0,
        gradient_checkpointing: bool = False,
        _do_init: bool = True,
        output_loading_info: bool = False,
        **options: Any,
    ) -> Self | tuple[Any, ...]:
        """Load a model from any checkpoint of this architecture.

        Args:
            pretrained_model_name_or_path: a directory, a single file, a hub id, or an open checkpoint.
            dtype: type of the computation and of the parameters: `float64`, `float32`, `bfloat16`, `float16` or `auto`
                (as saved); `float32` if not given.
            config: used instead of the one beside the weights; or where that is.
            param_dtype: type of the parameters, if it is another; `float32` with `dtype="bfloat16"` is mixed precision.
            seed: where parameters that the checkpoint lacks are drawn from.
            gradient_checkpointing: see the constructor.
            _do_init: `False` returns the parameters beside the model, which then has none.
            output_loading_info: also return which parameters were missing, unexpected or mis-shaped.
            options: see `loading.prepare`: `format`, `ignore_mismatched_sizes`, `strict`, `add_pooling_layer`, the
                hub's keywords (`revision`, `cache_dir`, `token`, ...), and fields of the config to override. Keywords
                of transformers that change nothing here are taken, see `keywords`; `torch_dtype` is `dtype`.

        Returns:
            The model; with `_do_init=False` the model and its parameters; with `output_loading_info` followed by that.

        Raises:
            LoadError: naming every tensor that is missing, unexpected or mis-shaped.
            CheckpointError: when the file is cut short, no checkpoint, or of another architecture.
            ValueError: when `float64` is asked for while JAX is in its 32-bit mode.
        """
        options = keywords.settle(options)
        dtype = options.pop("torch_dtype", dtype)
        loaded = loading.prepare(pretrained_model_name_or_path, cls.head, config=config, dtype=dtype, **options)
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
        arrays = weights.load(model, loaded.tensors(mapped=True)) | weights.initialize(model, loaded.fresh(), model.key)
        params = unflatten_dict(arrays)
        model.generation_config = loaded.generation_config
        if _do_init:
            model.params = params
        returned = (model,) if _do_init else (model, params)
        returned += (loaded.info.to_dict(),) if output_loading_info else ()
        return returned if len(returned) > 1 else model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        params: Params | None = None,
        *,
        format: str | None = None,
        safe_serialization: bool = True,
        max_shard_size: int | str = "5GB",
        is_main_process: bool = True,
        **options: Any,
    ) -> None:
        """Write the weights and `config.json` into a directory; a failure leaves the files that were there whole.

        Args:
            save_directory: made if it is not there.
            params: written instead of the model's own parameters.
            format: one of `checkpoint.FORMATS`.
            safe_serialization: without `format`, `True` writes safetensors and `False` this framework's own format.
            max_shard_size: a larger checkpoint becomes several files; bytes, or a text such as `200MB`.
            is_main_process: `False` writes nothing, for the other processes of a distributed run.
            options: those of transformers that change nothing here, see `keywords`.
        """
        if unknown := keywords.settle(options):
            raise TypeError(f"save_pretrained has no option {', '.join(unknown)}")
        format = format or ("safetensors" if safe_serialization else NATIVE_FORMAT)
        params = self.params if params is None else params
        if is_main_process:
            checkpoint.save(
                weights.dump(self, params),
                save_directory,
                self.config,
                self.head,
                format,
                max_shard_size=max_shard_size,
                generation_config=self.generation_config,
            )

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

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of parameters, shared ones counted once.

        Args:
            only_trainable: leave frozen ones out.
            exclude_embeddings: leave the tables of tokens, positions, types and distances out.
        """
        return sum(
            parameter.size
            for name, parameter in self.parameters_of_schema.items()
            if not (exclude_embeddings and parameter.module.kind == "table")
            and not (only_trainable and name in self.frozen)
        )

    def tie_weights(self) -> None:
        """Nothing to do: a tied decoder computes with the word table itself."""

    def freeze(self, *paths: str) -> None:
        """Take parameters out of training: `trainable_mask` says so to the optimizer, who decides in Flax.

        Args:
            paths: parameters, or modules with all that is in them, by canonical name, such as
                `roberta_prelayernorm.embeddings`; the whole base model if none is given.
        """
        self.frozen |= {item.name for item in schema.select(self.parameters_of_schema, paths or (schema.PREFIX,))}

    def unfreeze(self, *paths: str) -> None:
        """Take parameters back into training; see `freeze`."""
        self.frozen -= {item.name for item in schema.select(self.parameters_of_schema, paths or (schema.PREFIX,))}

    def trainable_mask(self) -> dict[str, Any]:
        """A tree of booleans in the form of the parameters, false where they are frozen.

        `optax.multi_transform({True: optimizer, False: optax.set_to_zero()}, model.trainable_mask())` trains the rest.
        """
        parameters = self.parameters_of_schema.items()
        return unflatten_dict(
            {weights.owner(self, parameter): name not in self.frozen for name, parameter in parameters}
        )

    def to_bf16(self, params: Params, mask: Params | None = None) -> Params:
        """A copy of the parameters in bfloat16; with a mask, a tree of booleans, only those where it is true."""
        return cast(params, jnp.bfloat16, mask)

    def to_fp16(self, params: Params, mask: Params | None = None) -> Params:
        """A copy of the parameters in float16; see `to_bf16`."""
        return cast(params, jnp.float16, mask)

    def to_fp32(self, params: Params, mask: Params | None = None) -> Params:
        """A copy of the parameters in float32; see `to_bf16`."""
        return cast(params, jnp.float32, mask)

    def partition_specs(self, mesh: Mesh | AbstractMesh, rules: sharding.Rules) -> dict[str, Any]:
        """How to share the parameters out over a mesh of devices: a `PartitionSpec` for each, nested as `params` are.

        Args:
            mesh: the devices, with names for its axes.
            rules: axes of `schema.MODULES` to axes of the mesh, such as `{"attention_size": "model",
                "intermediate_size": "model", "vocab_size": "model"}`; the others stay whole. An axis of the mesh shares
                out one axis of an array: the first that asks for it, in the order of the schema.

        Raises:
            ValueError: when a rule names an axis that is not there, or one whose length the mesh does not divide.
        """
        return unflatten_dict(sharding.partition_specs(self, mesh, rules))

    # ------------------------------------------------------------- gradient checkpointing

    def gradient_checkpointing_enable(self) -> None:
        """Let the backward pass compute each layer anew instead of keeping its insides: less memory, same numbers.

        What is compiled already stays as it is.
        """
        self.module = self.module.clone(gradient_checkpointing=True)

    enable_gradient_checkpointing = gradient_checkpointing_enable
    """The name in transformers."""

    def gradient_checkpointing_disable(self) -> None:
        """Keep the insides of the layers for the backward pass again."""
        self.module = self.module.clone(gradient_checkpointing=False)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether the backward pass computes each layer anew."""
        return self.module.gradient_checkpointing

    # ------------------------------------------------------------- embeddings and heads

    def get_input_embeddings(self, params: Params | None = None) -> Array:
        """The word table, (V, D)."""
        return self.table(surgery.WORD_TABLE, params)

    def set_input_embeddings(self, value: Array, params: Params | None = None) -> Params:
        """Take an array (V, D) for the word table; a tied decoder follows. Returns the parameters with it, which are
        the model's own unless `params` are given."""
        return self.set_table(surgery.WORD_TABLE, value, params)

    def get_output_embeddings(self, params: Params | None = None) -> Array | None:
        """What turns states into logits of tokens, (V, D); None without a language model."""
        if self.head not in schema.LM_HEADS:
            return None
        return self.table(surgery.WORD_TABLE if self.config.tie_word_embeddings else surgery.DECODER, params)

    def set_output_embeddings(self, new_embeddings: Array, params: Params | None = None) -> Params:
        """Take an array (V, D) for the decoder of an untied language model; see `set_input_embeddings`."""
        checks.own_decoder(self.config, self.head)
        return self.set_table(surgery.DECODER, new_embeddings, params)

    def table(self, name: str, params: Params | None) -> Array:
        """A parameter of (V, D)."""
        parameter = self.parameters_of_schema[name]
        array = weights.get(self.params if params is None else params, weights.owner(self, parameter))
        return array.T if parameter.leaf.transposed else array

    def set_table(self, name: str, value: Array, params: Params | None) -> Params:
        """Take the values of an array for a parameter of (V, D)."""
        parameter, array = self.parameters_of_schema[name], np.asarray(value)
        checks.table(array.shape, parameter.shape)
        return self.put([(parameter, array.astype(self.table(name, params).dtype))], params)

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
        params: Params | None = None,
    ) -> Params:
        """Change the number of tokens; the decoder and its bias follow, and `config.vocab_size`.

        Args:
            new_num_tokens: rows at the end are cut off, or new ones appended; the number there is if not given.
            pad_to_multiple_of: the number is rounded up to a multiple of this.
            mean_resizing: whether new rows lie around the mean of the old ones; see `surgery.resize_vocabulary`.
            params: the parameters, if the model has none of its own.

        Returns:
            The parameters with the new tables: make the state of the optimizer after this.

        Raises:
            ConfigError: when the number is no positive integer, or would cut off a special token.
        """
        params_before = self.params if params is None else params
        size = surgery.vocabulary_size(self.config, new_num_tokens, pad_to_multiple_of)
        if size == self.config.vocab_size:
            return params_before
        tensors = weights.dump(self, params_before)
        return self.reshape(*surgery.resize_vocabulary(tensors, self.config, size, mean_resizing), params)

    def prune_heads(self, heads_to_prune: Mapping[int, Iterable[int]], params: Params | None = None) -> Params:
        """Remove heads of the self-attention, which has the effect of zeros in `head_mask`.

        Args:
            heads_to_prune: heads to remove by layer, in the original numbering; `config.pruned_heads` keeps account.
            params: the parameters, if the model has none of its own.

        Returns:
            The parameters that are left.

        Raises:
            ConfigError: when a layer or head is not there, or a layer would lose all of its heads.
        """
        tensors = weights.dump(self, self.params if params is None else params)
        return self.reshape(*surgery.prune_heads(tensors, self.config, heads_to_prune), params)

    def reshape(self, tensors: surgery.Tensors, config: RobertaPreLayerNormConfig, params: Params | None) -> Params:
        """Become the model of another config: take its values over, and the tensors that have another shape there.

        Raises:
            ValueError: when parameters are given to a model that has its own, which would not fit it any more.
        """
        if params is not None and self._params is not None:
            raise ValueError(
                "a model changes its shape with the parameters that it holds: set model.params to the ones given, or "
                "make the model with _do_init=False"
            )
        vars(self.config).update(vars(config))
        parameters = self.parameters_of_schema
        return self.put([(parameters[name], array) for name, array in tensors.items()], params)

    def put(self, tensors: Iterable[tuple[schema.Parameter, np.ndarray]], params: Params | None) -> Params:
        """Parameters with some canonical tensors in their places; the model's own unless `params` are given."""
        kept = flatten_dict(unfreeze(self.params if params is None else params))
        changed = unflatten_dict({**kept, **weights.load(self, tensors)})
        if params is None:
            self.params = changed
        return changed

    # ------------------------------------------------------------- calls

    def path(self, **inputs: Any) -> Path:
        """Which way a call with these arguments would take, without computing it; see `paths`."""
        return paths.describe(
            self.head,
            inputs,
            fused=False,
            training=inputs.get("train", False),
            dtype=self.dtype.name,
            parameters=self.param_dtype.name,
            compiled=isinstance(jnp.zeros(()), jax.core.Tracer),
        )

    def apply(
        self, params: Params | None, dropout_rng: Array | None, train: bool, *arguments: Any, **options: Any
    ) -> Any:
        """Call the module.

        Raises:
            ValueError: when `train` is true and there is no `dropout_rng`.
        """
        if train and dropout_rng is None:
            raise ValueError("train=True applies dropout and needs its key: give dropout_rng=jax.random.key(...)")
        return self.module.apply(
            {"params": self.params if params is None else params},
            *arguments,
            **options,
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
