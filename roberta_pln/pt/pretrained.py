"""What every model can do: load, save, count its parameters, read arguments."""

import os
from collections.abc import Iterable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from roberta_pln import checkpoint, checks, loading, schema
from roberta_pln.config import RobertaPreLayerNormConfig
from roberta_pln.outputs import ModelOutput
from roberta_pln.pt import records, weights  # noqa: F401  records registers itself

NATIVE_FORMAT = "torch"
"""What `save_pretrained(safe_serialization=False)` writes."""


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
        config.validate()
        self.config = config

    def post_init(self) -> None:
        """Tie, check against the schema and initialise; the last step of every constructor."""
        self.tie_weights()
        weights.check(self)
        weights.initialize(self, self.parameters_of_schema.values())

    # ------------------------------------------------------------- load and save

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str] | checkpoint.Checkpoint,
        *,
        config: RobertaPreLayerNormConfig | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device = "cpu",
        output_loading_info: bool = False,
        **options: Any,
    ) -> Self | tuple[Self, dict[str, Any]]:
        """Load a model from any checkpoint of this architecture.

        Args:
            path: a directory, a single file, a hub id, or an open checkpoint.
            config: used instead of the one beside the weights.
            dtype: `float64`, `float32`, `bfloat16`, `float16` or `auto` (as saved); `float32` if not given.
            device: where to put the weights.
            output_loading_info: also return which parameters were missing, unexpected or mis-shaped.
            options: see `loading.prepare`: `ignore_mismatched_sizes`, `strict`, `add_pooling_layer`, the hub's
                keywords (`revision`, `cache_dir`, `token`, ...), and fields of the config to override.

        Raises:
            LoadError: naming every tensor that is missing, unexpected or mis-shaped.
            CheckpointError: when the file is cut short, no checkpoint, or of another architecture.
        """
        loaded = loading.prepare(path, cls.head, config=config, dtype=dtype, **options)
        with torch.device("meta"):
            model = cls(loaded.config, **loaded.constructor)
        model = model.to(getattr(torch, loaded.dtype))
        weights.load(model, loaded.tensors(), device)
        fresh = loaded.fresh()
        for parameter in fresh:
            module, name = weights.owner(model, parameter)
            setattr(module, name, nn.Parameter(torch.empty_like(getattr(module, name), device=device)))
        weights.initialize(model, fresh)
        model.tie_weights()
        model.eval()
        return (model, loaded.info.to_dict()) if output_loading_info else model

    def save_pretrained(
        self, directory: str | os.PathLike[str], *, format: str | None = None, safe_serialization: bool = True
    ) -> None:
        """Write the weights and `config.json` into a directory; a failure leaves the files that were there whole.

        Args:
            directory: made if it is not there.
            format: one of `checkpoint.FORMATS`.
            safe_serialization: without `format`, `True` writes safetensors and `False` this framework's own format.
        """
        format = format or ("safetensors" if safe_serialization else NATIVE_FORMAT)
        checkpoint.save(weights.dump(self), directory, self.config, self.head, format)

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

    def num_parameters(self, only_trainable: bool = False) -> int:
        """Number of parameters, shared ones counted once."""
        return sum(value.numel() for value in self.parameters() if value.requires_grad or not only_trainable)

    def tie_weights(self) -> None:
        """Make the names that the schema ties one parameter."""
        for alias, name in schema.ties(self.config, self.head).items():
            module_path, _, leaf = alias.rpartition(".")
            source_path, _, source_leaf = name.rpartition(".")
            setattr(self.get_submodule(module_path), leaf, getattr(self.get_submodule(source_path), source_leaf))

    # ------------------------------------------------------------- arguments

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
        return record if as_record else record.plain()
