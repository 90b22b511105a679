"""`model.weights.h5`: the HDF5 layout of Keras 3, which goes by the attributes that hold the parts of a model.

It is what `save_weights` of this library's TensorFlow models writes and `load_weights` takes; a `.keras` file, which
holds it together with the model's config, is read too. Keras saves the attributes of a model in the order of their
names, and one of them is `layers`, a list of all of its parts: what would come later is saved as an item of that
list, under its class's name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from roberta_pln import names, schema
from roberta_pln.checkpoint import hdf5, zipped
from roberta_pln.checkpoint.hdf5_reader import Group
from roberta_pln.checkpoint.stored import CheckpointError, Contents, Stored
from roberta_pln.config import ConfigError, RobertaPreLayerNormConfig, parse_json
from roberta_pln.schema import LEAVES, MODULES, PREFIX

_CONFIG: Final = "config.json"
_TRAINING: Final = "optimizer"
"""The group of what a compiled model has beside its parameters."""

_SPELLED: Final = (
    (r"^roberta_prelayernorm\b", "layers.roberta_pre_layer_norm_model", "behind `layers` in the order of names"),
    (r"^lm_head\b", "layers.lm_head", "behind `layers` in the order of names"),
    (r"^qa_outputs\b", "layers.dense", "behind `layers` in the order of names"),
    (r"\bpooler\b", "layers.pooler", "behind `layers` in the order of names"),
    (r"attention\.output\b", "attention.attention_output", "Keras keeps `output` for itself"),
    (r"\{i\}\.output\b", "{i}.feed_forward_output", "Keras keeps `output` for itself"),
)
"""(pattern in a module's name, how Keras has it, reason)."""


def _place(name: str) -> str:
    """The group of a module's arrays, from its name in the schema."""
    for pattern, replacement, _ in _SPELLED:
        name = re.sub(pattern, replacement, name)
    return name.replace(".", "/") + "/vars"


_HEAD: Final = [(module, _place(module.name)) for module in MODULES]
_BASE: Final = [
    (module, _place(module.name.removeprefix(f"{PREFIX}."))) for module, _ in _HEAD if PREFIX in module.name
]
"""Modules and their groups in files of a head, and of the base model; `{i}` is the layer."""
_MODULES: Final = {(place, len(LEAVES[module.kind])): module for module, place in _HEAD + _BASE}
"""Group and number of arrays in it to module; only the number tells the learned activations apart."""
_LAYER: Final = re.compile(r"(?<=encoder/layer/)layer(?:_([1-9][0-9]*))?(?=/)")
"""Keras numbers the items of a list that have one class: layer, layer_1, layer_2, ..."""


# ------------------------------------------------------------------ reading


def is_layout(path: Path) -> bool:
    """Whether a file is HDF5, or a `.keras` file, and not of Keras 2's layout."""
    try:
        with hdf5.opened(path) as file:
            return not _is_keras_2(file)
    except CheckpointError:
        return False


def _is_keras_2(top: Group) -> bool:
    return any(name.startswith("layer_names") for name in top.attributes)


def read(path: Path) -> Contents:
    """Open a file of this layout; see `hdf5` for what is refused. An optimizer's state is left out."""
    tensors: dict[str, Stored] = {}
    left_out = []
    with hdf5.opened(path) as file:
        if _is_keras_2(file):
            raise CheckpointError(f"{path} has the layout of Keras 2: read it as format 'h5'")
        for place, arrays in hdf5.groups(path, file).items():
            if place.partition("/")[0] == _TRAINING:
                left_out.append(place)
                continue
            for array, name in _names(place, arrays).items():
                if name in tensors:
                    raise CheckpointError(f"{path} holds {name!r} twice, the second time in {place!r}")
                tensors[name] = hdf5.stored(path, file, f"{place}/{array}")
    hdf5.check_distinct(path, tensors)
    return Contents("tf", tensors, config=_config(path), left_out=tuple(left_out))


def _names(place: str, arrays: list[str]) -> dict[str, str]:
    """What `tf_model.h5` calls the arrays of one group; those of no group that is known keep their places."""
    layer = _LAYER.search(place)
    module = _MODULES.get((_LAYER.sub("{i}", place), len(arrays)))
    numbered = [str(number) for number in range(len(arrays))]
    if module is None or set(arrays) != set(numbered):
        return {array: f"{place}/{array}" for array in arrays}
    name = module.name.replace("{i}", layer[1] or "0") if layer else module.name
    leaves = zip(numbered, LEAVES[module.kind], strict=True)
    return {array: names.stored("tf", f"{name}.{leaf.name}", "").name for array, leaf in leaves}


def _config(path: Path) -> RobertaPreLayerNormConfig | None:
    """The config in a `.keras` file, if the model in it is one of ours."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\3\4" or _CONFIG not in (places := zipped.places(path)):
            return None
        start, size = places[_CONFIG]
        file.seek(start)
        try:
            model = parse_json(_CONFIG, file.read(size))
            name, values = model["class_name"], model["config"]["config"]
            if schema.head_of([str(name)]) is not None:
                values = {**values, "architectures": [name]}
            return RobertaPreLayerNormConfig.from_dict(values)
        except (ValueError, TypeError, KeyError, ConfigError) as error:
            raise CheckpointError(f"{path} holds no model of this library: its {_CONFIG} says {error!r}") from error


# ------------------------------------------------------------------ writing


def write(path: Path, tensors: Mapping[str, Stored], ties: Mapping[str, str], head: str, shard: bool = False) -> None:
    """Write what `load_weights` of a model of that head takes."""
    arrays = {
        names.stored("tf", f"{module.name}.{leaf.name}", head).name: f"{place}/{number}"
        for module, place in (_BASE if head == "Model" else _HEAD)
        for number, leaf in enumerate(LEAVES[module.kind])
    }
    with hdf5.created(path) as file:
        for name, tensor in tensors.items():
            layer = re.search(r"layer_\._(\d+)", name)
            item = "layer" if layer is None or layer[1] == "0" else f"layer_{layer[1]}"
            place = arrays[re.sub(r"layer_\._\d+", "layer/{i}", name)]
            hdf5.write(file, place.replace("{i}", item), tensor)


def index_keys(tensors: Mapping[str, Stored], ties: Mapping[str, str], head: str) -> dict[str, str]:
    """Name in an index to name in the files; Keras has another index, so there are no shards."""
    return {name: name for name in tensors}
