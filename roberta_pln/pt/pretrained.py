"""What every model can do: load, save, count its parameters, read arguments."""

import ctypes
import functools
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from roberta_pln import checkpoint, checks, keywords, loading, paths, schema, surgery
from roberta_pln.config import RobertaPreLayerNormConfig
from roberta_pln.generation import GenerationConfig
from roberta_pln.outputs import ModelOutput
from roberta_pln.paths import Path
from roberta_pln.pt import records, weights  # noqa: F401  records registers itself

NATIVE_FORMAT = "torch"
"""What `save_pretrained(safe_serialization=False)` writes."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Options of glibc's `mallopt`."""


class RobertaPreLayerNormPreTrainedModel(nn.Module):
    """Base of all models.

    A model that was constructed is in training mode and has fresh weights drawn from PyTorch's generator; one from
    `from_pretrained` is in evaluation mode.

    Args:
        config: sizes and switches, checked again here.
    """

    config_class = RobertaPreLayerNormConfig
    base_model_prefix = schema.PREFIX
    framework = "pt"
    head: ClassVar[str]

    def __init__(self, config: RobertaPreLayerNormConfig) -> None:
        super().__init__()
        keep_freed_memory()
        checks.own_config(config)
        config.validate()
        self.config = config
        self.generation_config = GenerationConfig.from_model_config(config) if self.head == "ForCausalLM" else None

    def post_init(self) -> None:
        """Tie, check against the schema and initialise; the last step of every constructor."""
        self.tie_weights()
        weights.check(self)
        weights.initialize(self, self.parameters_of_schema.values())

    # ------------------------------------------------------------- load and save

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | checkpoint.Checkpoint,
        *,
        config: RobertaPreLayerNormConfig | str | os.PathLike[str] | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device = "cpu",
        output_loading_info: bool = False,
        **options: Any,
    ) -> Self | tuple[Self, dict[str, Any]]:
        """Load a model from any checkpoint of this architecture.

        Args:
            pretrained_model_name_or_path: a directory, a single file, a hub id, or an open checkpoint.
            config: used instead of the one beside the weights; or where that is.
            dtype: `float64`, `float32`, `bfloat16`, `float16` or `auto` (as saved); `float32` if not given.
            device: where to put the weights.
            output_loading_info: also return which parameters were missing, unexpected or mis-shaped.
            options: see `loading.prepare`: `format`, `ignore_mismatched_sizes`, `strict`, `add_pooling_layer`, the
                hub's keywords (`revision`, `cache_dir`, `token`, ...), and fields of the config to override. Keywords
                of transformers that change nothing here are taken, see `keywords`; `torch_dtype` is `dtype`.

        Raises:
            LoadError: naming every tensor that is missing, unexpected or mis-shaped.
            CheckpointError: when the file is cut short, no checkpoint, or of another architecture.
        """
        options = keywords.settle(options)
        dtype = options.pop("torch_dtype", dtype)
        loaded = loading.prepare(pretrained_model_name_or_path, cls.head, config=config, dtype=dtype, **options)
        with weights.left_blank():
            model = cls(loaded.config, **loaded.constructor)
        model = model.to(getattr(torch, loaded.dtype))
        weights.load(model, loaded.tensors(mapped=True), device)
        fresh = loaded.fresh()
        for parameter in fresh:
            module, name = weights.owner(model, parameter)
            setattr(module, name, nn.Parameter(torch.empty_like(getattr(module, name), device=device)))
        weights.initialize(model, fresh)
        model.tie_weights()
        model.eval()
        model.generation_config = loaded.generation_config
        return (model, loaded.info.to_dict()) if output_loading_info else model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
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
            format: one of `checkpoint.FORMATS`.
            safe_serialization: without `format`, `True` writes safetensors and `False` this framework's own format.
            max_shard_size: a larger checkpoint becomes several files; bytes, or a text such as `200MB`.
            is_main_process: `False` writes nothing, for the other processes of a distributed run.
            options: those of transformers that change nothing here, see `keywords`.
        """
        if unknown := keywords.settle(options):
            raise TypeError(f"save_pretrained has no option {', '.join(unknown)}")
        format = format or ("safetensors" if safe_serialization else NATIVE_FORMAT)
        if is_main_process:
            checkpoint.save(
                weights.dump(self),
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
        pooled = getattr(self.base_model, "pooler", None) is not None
        return schema.expand(self.config, self.head, add_pooling_layer=pooled)

    @property
    def base_model(self) -> nn.Module:
        """The model without its head."""
        return getattr(self, self.base_model_prefix, self)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of parameters, shared ones counted once.

        Args:
            only_trainable: leave frozen ones out.
            exclude_embeddings: leave the tables of tokens, positions, types and distances out.
        """
        return sum(
            parameter.size
            for parameter in self.parameters_of_schema.values()
            if not (exclude_embeddings and parameter.module.kind == "table")
            and not (only_trainable and not weights.get(self, parameter).requires_grad)
        )

    def init_weights(self) -> None:
        """Draw all parameters anew, as the schema says."""
        weights.initialize(self, self.parameters_of_schema.values())

    def tie_weights(self) -> None:
        """Make the names that the schema ties one parameter."""
        for alias, name in schema.ties(self.config, self.head).items():
            module_path, _, leaf = alias.rpartition(".")
            source_path, _, source_leaf = name.rpartition(".")
            weights.put(self.get_submodule(module_path), leaf, getattr(self.get_submodule(source_path), source_leaf))

    def freeze(self, *paths: str) -> None:
        """Take parameters out of training.

        Args:
            paths: parameters, or modules with all that is in them, by canonical name, such as
                `roberta_prelayernorm.embeddings`; the whole base model if none is given.
        """
        for parameter in schema.select(self.parameters_of_schema, paths or (schema.PREFIX,)):
            weights.get(self, parameter).requires_grad_(False)

    def unfreeze(self, *paths: str) -> None:
        """Take parameters back into training; see `freeze`."""
        for parameter in schema.select(self.parameters_of_schema, paths or (schema.PREFIX,)):
            weights.get(self, parameter).requires_grad_(True)

    # ------------------------------------------------------------- embeddings and heads

    def get_input_embeddings(self) -> nn.Embedding:
        """The module with the word table, (V, D)."""
        return self.base_model.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding | Tensor) -> None:
        """Take a module's table, or a tensor (V, D), for the word table; a tied decoder follows."""
        self.set_table(surgery.WORD_TABLE, value)

    def get_output_embeddings(self) -> nn.Linear | None:
        """The module that turns states into logits of tokens, whose weight is (V, D); None without a language model."""
        return self.lm_head.decoder if self.head in schema.LM_HEADS else None

    def set_output_embeddings(self, new_embeddings: nn.Linear | Tensor) -> None:
        """Take a module's weight, or a tensor (V, D), for the decoder of an untied language model."""
        checks.own_decoder(self.config, self.head)
        self.set_table(surgery.DECODER, new_embeddings)

    def set_table(self, name: str, value: nn.Module | Tensor) -> None:
        """Take a module's weight itself, or a copy of a tensor's values, for a parameter of (V, D)."""
        parameter = self.parameters_of_schema[name]
        table = getattr(value, "weight", value)
        checks.table(tuple(table.shape), parameter.shape)
        module, leaf = weights.owner(self, parameter)
        weights.put(
            module, leaf, table if isinstance(table, nn.Parameter) else nn.Parameter(self.states(table).clone())
        )
        self.tie_weights()

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """Change the number of tokens; the decoder and its bias follow, and `config.vocab_size`.

        Args:
            new_num_tokens: rows at the end are cut off, or new ones appended; the number there is if not given.
            pad_to_multiple_of: the number is rounded up to a multiple of this.
            mean_resizing: whether new rows lie around the mean of the old ones; see `surgery.resize_vocabulary`.

        Returns:
            The module with the word table, as `get_input_embeddings`. Parameters of another shape are new objects:
            make the optimizer after this.

        Raises:
            ConfigError: when the number is no positive integer, or would cut off a special token.
        """
        size = surgery.vocabulary_size(self.config, new_num_tokens, pad_to_multiple_of)
        if size != self.config.vocab_size:
            self.reshape(*surgery.resize_vocabulary(weights.dump(self), self.config, size, mean_resizing))
        return self.get_input_embeddings()

    def prune_heads(self, heads_to_prune: Mapping[int, Iterable[int]]) -> None:
        """Remove heads of the self-attention, which has the effect of zeros in `head_mask`.

        Args:
            heads_to_prune: heads to remove by layer, in the original numbering; `config.pruned_heads` keeps account.

        Raises:
            ConfigError: when a layer or head is not there, or a layer would lose all of its heads.
        """
        self.reshape(*surgery.prune_heads(weights.dump(self), self.config, heads_to_prune))

    def reshape(self, tensors: surgery.Tensors, config: RobertaPreLayerNormConfig) -> None:
        """Become the model of another config: take its values over, and the tensors that have another shape there."""
        vars(self.config).update(vars(config))
        for i, layer in enumerate(self.base_model.encoder.layer):
            layer.attention.self.keep(config.kept_heads(i))
        parameters = self.parameters_of_schema
        weights.load(self, ((parameters[name], array) for name, array in tensors.items()), self.device)
        self.tie_weights()
        weights.check(self)

    # ------------------------------------------------------------- gradient checkpointing

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None) -> None:
        """Let the backward pass compute each layer anew instead of keeping its insides: less memory, same numbers.

        Args:
            gradient_checkpointing_kwargs: options of `torch.utils.checkpoint.checkpoint`.
        """
        self.base_model.encoder.gradient_checkpointing = {
            "use_reentrant": False,
            **(gradient_checkpointing_kwargs or {}),
        }

    def gradient_checkpointing_disable(self) -> None:
        """Keep the insides of the layers for the backward pass again."""
        self.base_model.encoder.gradient_checkpointing = None

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether the backward pass computes each layer anew."""
        return self.base_model.encoder.gradient_checkpointing is not None

    # ------------------------------------------------------------- arguments

    def path(self, **inputs: Any) -> Path:
        """Which way a call with these arguments would take, without computing it; see `paths`."""
        attention = self.base_model.encoder.layer[0].attention.self
        weight = attention.query.weight
        dtype = weight.dtype
        if torch.is_autocast_enabled(weight.device.type):
            dtype = torch.get_autocast_dtype(weight.device.type)
        shown = inputs.get("output_attentions")
        shown = self.config.output_attentions if shown is None else shown
        return paths.describe(
            self.head,
            inputs,
            fused=attention.is_plain(torch.empty(0, dtype=dtype), inputs.get("head_mask"), shown),
            training=self.training,
            dtype=str(dtype).removeprefix("torch."),
            parameters=str(weight.dtype).removeprefix("torch."),
            compiled=torch.compiler.is_compiling(),
        )

    def tensor(self, value: Any) -> Tensor | None:
        """An argument as a tensor; arrays and lists are converted."""
        return value if value is None or isinstance(value, Tensor) else torch.as_tensor(value, device=self.device)

    def states(self, value: Any) -> Tensor | None:
        """An argument of hidden states, in the model's type."""
        return None if value is None else self.tensor(value).to(self.dtype)

    def ids(self, name: str, value: Any, *shapes: Iterable[int | None]) -> Tensor | None:
        """An argument of integers as an int64 tensor of one of the allowed shapes."""
        value = self.tensor(value)
        if value is None:
            return None
        checks.integer(name, str(value.dtype).removeprefix("torch."))
        if shapes:
            checks.shape(name, tuple(value.shape), *shapes)
        return value.long()

    def returned(self, record: ModelOutput, return_dict: bool | None) -> ModelOutput | tuple:
        """The record, or its tuple form if the call or the config asks for it."""
        as_record = self.config.return_dict if return_dict is None else return_dict
        checks.switches(return_dict=as_record)
        return record if as_record else record.plain()


@functools.cache
def keep_freed_memory() -> None:
    """Have glibc keep up to 512 MiB that is freed, and blocks of up to 256 MiB among it, for the rest of the process.

    Otherwise every layer and every gradient gets its memory from the system anew, which takes 4 % of a forward pass and
    8 % of a training step. Where the environment sets up glibc's memory itself, or there is no glibc, nothing changes.
    """
    settings = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_option is not None and not any(name in os.environ for name in settings):
        set_option(M_MMAP_THRESHOLD, 2**28)
        set_option(M_TRIM_THRESHOLD, 2**29)
