"""What other libraries call a parameter: their names to canonical ones and back, both from the rows of `schema`.

A stored name is a path and a leaf. Paths are the same everywhere but for how layers are numbered and whether the
base model has a prefix; leaves are named by the kind of their module, in `schema.LEAVES`. What is left over is in
the short tables below, each entry with its reason.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

from roberta_pln import schema
from roberta_pln.schema import LEAVES, MODULES, PREFIX, TIES, Kind, Leaf

Family = Literal["torch", "tf", "flax"]

FAMILIES: Final[tuple[Family, ...]] = ("torch", "tf", "flax")
"""Whose names a file may use: transformers' PyTorch, TensorFlow and Flax classes (PyTorch's are the canonical ones)."""

ROBERTA: Final = "roberta."
"""How names of the efficient-MLM authors' files start, and those of RoBERTa itself."""

PREFIXES: Final[tuple[tuple[tuple[Family, ...], str, str, str], ...]] = (
    (FAMILIES, "", "", "head classes, and every TensorFlow class, save canonical paths"),
    (("torch", "flax"), "", f"{PREFIX}.", "the base class in PyTorch and Flax saves its parameters without a prefix"),
    (("torch",), ROBERTA, f"{PREFIX}.", "the efficient-MLM authors' port has RoBERTa's attribute name"),
)
"""(families, stored start of a path, canonical start, reason). At most one row gives a path of the schema."""

DROPPED: Final = (
    (r"(.+\.)?embeddings\.(position_ids|token_type_ids)", "buffers of old PyTorch files: ranges and zeros"),
    (r"roberta\.encoder\.layer\.\d+\.attention\.self\.LayerNorm\.(weight|bias)", "made but never used by that port"),
)
"""(whole path and leaf of PyTorch files, reason)."""

OLD_LEAVES: Final = {
    ("torch", "norm", "gamma"): ("weight", "PyTorch files that were converted from TensorFlow 1"),
    ("torch", "norm", "beta"): ("bias", "PyTorch files that were converted from TensorFlow 1"),
    ("tf", "table", "weight"): ("weight", "transformers names the word table so, and accepts it for the other tables"),
}
"""(family, kind of module, stored leaf) to (canonical leaf, reason), beside the leaves of `schema.LEAVES`."""


@dataclass(frozen=True)
class Name:
    """A name on the other side.

    Attributes:
        name: the name.
        transposed: whether the array is the transpose of this side's.
    """

    name: str
    transposed: bool = False


def canonical(family: Family, stored: str) -> Name | None:
    """The canonical name of a stored one (or a second name, a key of `schema.TIES`); None when no rule knows it."""
    path, _, leaf_name = _path(family, stored).rpartition(".")
    for families, start, replacement, _ in PREFIXES:
        if family not in families or not path.startswith(start):
            continue
        module = replacement + path.removeprefix(start)
        if f"{module}.{leaf_name}" in TIES and leaf_name == "bias":
            return Name(f"{module}.{leaf_name}")
        leaf = _leaf(family, _KINDS.get(_template(module)), leaf_name)
        if leaf is not None:
            return Name(f"{module}.{leaf.name}", _transposed(family, leaf))
    return None


def dropped(family: Family, stored: str) -> bool:
    """Whether a stored name is known to hold nothing that a model needs."""
    return family == "torch" and any(re.fullmatch(pattern, stored) for pattern, _ in DROPPED)


def stored(family: Family, name: str, head: str) -> Name:
    """How a family stores a canonical name, or a key of `schema.TIES`, in files of one head.

    PyTorch's paths are joined by dots, the other two's by slashes.
    """
    if family == "torch":
        return Name(schema.path(name, head))
    path, _, leaf_name = name.rpartition(".")
    leaf = next(leaf for leaf in LEAVES[_KINDS[_template(path)]] if leaf.name == leaf_name)
    if family == "flax":
        return Name(f"{schema.path(path, head)}.{leaf.flax}".replace(".", "/"), leaf.transposed)
    tf_leaf = "weight" if path.endswith(".word_embeddings") else leaf.tf
    slashes = re.sub(r"/layer/(\d+)/", r"/layer_._\1/", path.replace(".", "/"))
    return Name(f"{slashes}/{tf_leaf}:0", leaf.transposed)


def _path(family: Family, stored: str) -> str:
    """A stored name with dots between its components, and layers numbered by a component of their own."""
    if family == "tf":
        return stored.removesuffix(":0").replace("/layer_._", "/layer/").replace("/", ".")
    return stored.replace("/", ".") if family == "flax" else stored


def _template(path: str) -> str:
    return re.sub(r"\.layer\.(0|[1-9][0-9]*)\.", ".layer.{i}.", path)


def _leaf(family: Family, kind: Kind | None, name: str) -> Leaf | None:
    if kind is None:
        return None
    old = OLD_LEAVES.get((family, kind, name))
    for leaf in LEAVES[kind]:
        spelled = {"torch": leaf.name, "tf": leaf.tf, "flax": leaf.flax}[family]
        if name == spelled or (old is not None and old[0] == leaf.name):
            return leaf
    return None


def _transposed(family: Family, leaf: Leaf) -> bool:
    return leaf.transposed and family != "torch"


_KINDS: Final[dict[str, Kind]] = {module.name: module.kind for module in MODULES}
