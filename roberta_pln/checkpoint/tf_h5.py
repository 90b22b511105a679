"""`tf_model.h5`: the HDF5 layout of Keras 2, which names every variable in the attributes of its layer's group."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from roberta_pln.checkpoint import atomic
from roberta_pln.checkpoint.stored import BUFFER_DTYPES, DTYPES, Array, CheckpointError, Contents, Stored
from roberta_pln.schema import LM_HEADS, PREFIX

_KNOWN: Final = [*DTYPES.values(), *BUFFER_DTYPES.values()]


def _h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise ImportError("tf_model.h5 needs h5py: pip install 'roberta_pln[tf]', or h5py alone") from error
    return h5py


# ------------------------------------------------------------------ reading


def read(path: Path) -> Contents:
    """Open an HDF5 file. Links, external and virtual storage and filters are refused: they reach outside the file.

    The HDF5 library itself may crash on a file that was damaged on purpose; prefer safetensors from strangers.
    """
    h5py = _h5py()
    tensors: dict[str, Stored] = {}
    copies: dict[str, str] = {}
    try:
        with h5py.File(path, "r") as file:
            for layer in _names(path, file, "layer_names"):
                for weight in _names(path, _at(path, file, layer), "weight_names"):
                    place = f"{layer}/{weight}"
                    name = weight.partition("/")[2]  # the first component is the model's name, which is free
                    if name in tensors:  # language-model heads repeat the embeddings
                        copies[place] = name
                    tensors[place if name in tensors else name] = _stored(path, _at(path, file, place), place)
    except CheckpointError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:  # what h5py makes of broken files
        raise CheckpointError(f"{path} is cut short or no HDF5 file: {error}") from error
    return Contents("tf", tensors, copies)


def _names(path: Path, group: Any, attribute: str) -> list[str]:
    """A list of names, as one attribute or, above HDF5's limit, as several that are numbered from 0."""
    keys = [attribute] if attribute in group.attrs else []
    while f"{attribute}{len(keys)}" in group.attrs:
        keys.append(f"{attribute}{len(keys)}")
    if not keys:
        raise CheckpointError(f"{path}: {group.name} has no attribute {attribute!r}, as Keras 2 writes")
    found = [name for key in keys for name in np.asarray(group.attrs[key]).reshape(-1).tolist()]
    if not all(isinstance(name, str | bytes) for name in found):
        raise CheckpointError(f"{path}: {attribute!r} of {group.name} must hold names, got {found}")
    return [name.decode("utf-8", "replace") if isinstance(name, bytes) else name for name in found]


def _at(path: Path, file: Any, place: str) -> Any:
    """The group or dataset at a place, reached over hard links only."""
    h5py = _h5py()
    node = file
    for part in place.split("/"):
        if not isinstance(node, h5py.Group) or not part or part not in node:
            raise CheckpointError(f"{path} names {place!r}, which is not in it")
        if not isinstance(node.get(part, getlink=True), h5py.HardLink):
            raise CheckpointError(f"{path}: {place!r} is a soft or external link, which is refused; store the tensor")
        node = node[part]
    return node


def _stored(path: Path, dataset: Any, place: str) -> Stored:
    h5py = _h5py()
    if not isinstance(dataset, h5py.Dataset) or dataset.shape is None or dataset.dtype not in _KNOWN:
        raise CheckpointError(f"{path}: {place!r} must be a dataset of numbers, got {dataset!r}")
    if dataset.external or dataset.is_virtual:
        raise CheckpointError(f"{path}: {place!r} lies in another file, which is refused; store the tensor itself")
    tensor = Stored(dataset.shape, dataset.dtype, _reader(path, place), h5py.h5o.get_info(dataset.id).addr)
    held = dataset.id.get_storage_size()
    if dataset.id.get_create_plist().get_nfilters() or held < tensor.nbytes:
        raise CheckpointError(
            f"{path}: {place!r} is compressed or incomplete ({held} of {tensor.nbytes} bytes); store it whole, with "
            "`h5repack -f NONE` for instance"
        )
    return tensor


def _reader(path: Path, place: str) -> Callable[[], Array]:
    def read() -> Array:
        with _h5py().File(path, "r") as file:
            return np.asarray(file[place][()])

    return read


# ------------------------------------------------------------------ writing


def write(path: Path, tensors: Mapping[str, Stored], ties: Mapping[str, str], head: str) -> None:
    """Write the layout that transformers' TensorFlow classes load with nothing missing.

    In files of language-model heads the embeddings appear a second time under the head, as hard links.
    """
    h5py = _h5py()
    if any(tensor.dtype == DTYPES["bfloat16"] for tensor in tensors.values()):
        raise CheckpointError("HDF5 has no bfloat16: save in another format, or cast the model to float32 or float16")
    model = "tf_roberta_pre_layer_norm_" + re.sub(r"(?<=[a-z])(?=[A-Z])", "_", head).lower()
    layers: dict[str, list[str]] = {PREFIX: []}
    for name in tensors:
        layers.setdefault(name.partition("/")[0], []).append(name)
    if head in LM_HEADS:
        layers["lm_head"] += [name for name in tensors if name.startswith(f"{PREFIX}/embeddings/")]
    with atomic.replacing(path) as temporary, h5py.File(temporary, "w") as file:
        file.attrs.update(layer_names=list(layers), backend="tensorflow", keras_version="2.21.0")
        for layer, names in layers.items():
            group = file.create_group(layer)
            group.attrs["weight_names"] = [f"{model}/{name}" for name in names]
            for name in names:
                own = f"{name.partition('/')[0]}/{model}/{name}"
                if own in file:
                    group[f"{model}/{name}"] = file[own]
                else:
                    group.create_dataset(f"{model}/{name}", data=tensors[name].read(), dtype=tensors[name].dtype)
