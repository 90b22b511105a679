"""Canonical tensors to and from this framework's parameters, driven by the schema."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from roberta_pln import schema
from roberta_pln.schema import Parameter


class _NoInit(TorchFunctionMode):
    """Leaves out what PyTorch's modules draw; drawing without memory would import its compiler, a second long."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def left_blank() -> Iterator[None]:
    """Models constructed in this context have parameters without memory: their weights come from somewhere else."""
    with torch.device("meta"), _NoInit():
        yield


def owner(model: nn.Module, parameter: Parameter) -> tuple[nn.Module, str]:
    """The module that holds a parameter, and the parameter's name in it."""
    path, _, name = schema.path(parameter.name, model.head).rpartition(".")
    return model.get_submodule(path), name


def get(model: nn.Module, parameter: Parameter) -> nn.Parameter:
    """The framework's array of a parameter."""
    module, name = owner(model, parameter)
    return getattr(module, name)


def check(model: nn.Module) -> None:
    """Check that the model holds the parameters of the schema and no other.

    Raises:
        RuntimeError: when construction and schema disagree, which is a fault of this library.
    """
    built = {name: tuple(value.shape) for name, value in model.named_parameters()}
    told = {schema.path(name, model.head): parameter.shape for name, parameter in model.parameters_of_schema.items()}
    for alias, name in schema.ties(model.config, model.head).items():
        if alias in built:  # a shared parameter goes by whichever of its names comes first
            built[name] = built.pop(alias)
    if built != told:
        raise RuntimeError(f"parameters differ from the schema in {sorted(built.items() ^ told.items())}")


def initialize(model: nn.Module, parameters: Iterable[Parameter]) -> None:
    """Fill parameters as the schema says; the pad row of a padded table is zero. Draws from PyTorch's generator."""
    for parameter in parameters:
        tensor = get(model, parameter)
        if tensor.is_meta:
            continue
        with torch.no_grad():
            if parameter.initializer == "normal":
                tensor.normal_(0.0, model.config.initializer_range)
            else:
                tensor.fill_(parameter.initializer)
            if parameter.module.padding:
                tensor[model.config.pad_token_id] = 0.0


def load(model: nn.Module, tensors: Iterable[tuple[Parameter, np.ndarray]], device: torch.device | str) -> None:
    """Put canonical tensors in place, one at a time; a tensor may have another shape than the one before."""
    for parameter, array in tensors:
        module, name = owner(model, parameter)
        trains = getattr(module, name).requires_grad
        put(module, name, nn.Parameter(to_tensor(array).to(device), requires_grad=trains))


def put(module: nn.Module, name: str, value: nn.Parameter) -> None:
    """Put a parameter in the place of one, perhaps of another shape, which PyTorch's modules have noted as numbers."""
    setattr(module, name, value)
    if isinstance(module, nn.Embedding):
        module.num_embeddings = len(module.weight)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape


def dump(model: nn.Module) -> dict[str, np.ndarray]:
    """The model's parameters as canonical tensors; they share memory with the model where they can."""
    return {name: to_array(get(model, parameter)) for name, parameter in model.parameters_of_schema.items()}


def to_tensor(array: np.ndarray) -> Tensor:
    """A tensor that shares the array's memory, or has a copy of its values where the array may not be written to."""
    array = np.require(array, requirements=["C", "W"])
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_array(tensor: Tensor) -> np.ndarray:
    """The values of a tensor in NumPy."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
