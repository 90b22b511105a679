"""`tf_model.h5`: the HDF5 layout of Keras 2, which names every variable in the attributes of its layer's group."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from roberta_pln.checkpoint import hdf5
from roberta_pln.checkpoint.hdf5_reader import Dataset, Node
from roberta_pln.checkpoint.stored import DTYPES, CheckpointError, Contents, Stored
from roberta_pln.schema import LM_HEADS, PREFIX

# ------------------------------------------------------------------ reading


def read(path: Path) -> Contents:
    """Open a file of this layout; see `hdf5` for what is refused."""
    tensors: dict[str, Stored] = {}
    copies: dict[str, str] = {}
    with hdf5.opened(path) as file:
        for layer in _names(path, file, "layer_names"):
            if isinstance(place := hdf5.at(path, file, layer), Dataset):  # a shard names its tensors themselves
                tensors[layer] = hdf5.stored(path, file, layer)
                continue
            for weight in _names(path, place, "weight_names", layer):
                where = f"{layer}/{weight}"
                name = weight.partition("/")[2]  # the first component is the model's name, which is free
                if name in tensors:  # language-model heads repeat the embeddings
                    copies[where] = name
                tensors[where if name in tensors else name] = hdf5.stored(path, file, where)
    hdf5.check_distinct(path, {name: tensor for name, tensor in tensors.items() if name not in copies})
    return Contents("tf", tensors, copies)


def _names(path: Path, group: Node, attribute: str, of: str = "/") -> list[str]:
    """A list of names, as one attribute or, above HDF5's limit, as several that are numbered from 0."""
    keys = [attribute] if attribute in group.attributes else []
    while f"{attribute}{len(keys)}" in group.attributes:
        keys.append(f"{attribute}{len(keys)}")
    if not keys:
        raise CheckpointError(
            f"{path}: {of} has no attribute {attribute!r}, as Keras 2 writes; what save_weights of Keras 3 "
            "writes is of format 'keras'"
        )
    found = [name for key in keys for name in group.attributes[key]]
    if not all(isinstance(name, str) for name in found):
        raise CheckpointError(f"{path}: {attribute!r} of {of} must hold names, got numbers or other things")
    return found


# ------------------------------------------------------------------ writing


def write(path: Path, tensors: Mapping[str, Stored], ties: Mapping[str, str], head: str, shard: bool = False) -> None:
    """Write the layout that transformers' TensorFlow classes load with nothing missing.

    In files of language-model heads the embeddings appear a second time under the head, as hard links.
    """
    if any(tensor.dtype == DTYPES["bfloat16"] for tensor in tensors.values()):
        raise CheckpointError("HDF5 has no bfloat16: save in another format, or cast the model to float32 or float16")
    if shard:
        with hdf5.created(path) as file:
            file.attrs["layer_names"] = sorted(tensors)
            for name in sorted(tensors):
                hdf5.write(file, name, tensors[name])
        return
    model = _model_name(head)
    layers: dict[str, list[str]] = {PREFIX: []}
    for name in tensors:
        layers.setdefault(name.partition("/")[0], []).append(name)
    if head in LM_HEADS:
        layers["lm_head"] += [name for name in tensors if name.startswith(f"{PREFIX}/embeddings/")]
    with hdf5.created(path) as file:
        file.attrs.update(layer_names=list(layers), backend="tensorflow", keras_version="2.21.0")
        for layer, names in layers.items():
            group = file.create_group(layer)
            group.attrs["weight_names"] = [f"{model}/{name}" for name in names]
            for name in names:
                own = f"{name.partition('/')[0]}/{model}/{name}"
                if own in file:
                    group[f"{model}/{name}"] = file[own]
                else:
                    hdf5.write(group, f"{model}/{name}", tensors[name])


def index_keys(tensors: Mapping[str, Stored], ties: Mapping[str, str], head: str) -> dict[str, str]:
    """Name in an index to name in the files."""
    return {f"{_model_name(head)}/{name}": name for name in tensors}


def _model_name(head: str) -> str:
    """What transformers calls a model of a head, first of its kind in a process."""
    return "tf_roberta_pre_layer_norm_" + re.sub(r"(?<=[a-z])(?=[A-Z])", "_", head).lower()
