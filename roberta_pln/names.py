"""What other libraries call a parameter: their names to canonical ones and back, both from the rows of `schema`.

A stored name is a path and a leaf. Paths are the same everywhere but for how layers are numbered and whether the
base model has a prefix; leaves are named by the kind of their module, in `schema.LEAVES`. What is left over is in
the short tables below, each entry with its reason. Only fairseq has paths of its own, in the table `FAIRSEQ`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from roberta_pln import schema
from roberta_pln.schema import LAYER, LEAVES, MODULES, PREFIX, TIES, Kind, Leaf

Family = Literal["torch", "tf", "flax", "fairseq"]
"""Whose names a file may use: those of transformers' PyTorch (which are the canonical ones), TensorFlow and Flax
classes, or those of fairseq."""

FAMILIES: Final[tuple[Family, ...]] = ("torch", "tf", "flax")
"""Those that have a name for every parameter."""

ROBERTA: Final = "roberta."
"""How names of the efficient-MLM authors' files start, and those of RoBERTa itself."""

PREFIXES: Final[tuple[tuple[tuple[Family, ...], str, str, str], ...]] = (
    (FAMILIES, "", "", "head classes, and every TensorFlow class, save canonical paths"),
    (("torch", "flax"), "", f"{PREFIX}.", "the base class in PyTorch and Flax saves its parameters without a prefix"),
    (("torch",), ROBERTA, f"{PREFIX}.", "the efficient-MLM authors' port has RoBERTa's attribute name"),
)
"""(families, stored start of a path, canonical start, reason). At most one row gives a path of the schema."""

DROPPED: Final[tuple[tuple[Family, str, str], ...]] = (
    ("torch", r"(.+\.)?embeddings\.(position_ids|token_type_ids)", "buffers of old files: ranges and zeros"),
    (
        "torch",
        rf"(.+\.)?encoder\.layer\.\d+\.intermediate\.intermediate_act_fn\.({'|'.join(schema.XIELU_CONSTANTS)})",
        "constants of an activation, see `schema.XIELU_CONSTANTS`",
    ),
    (
        "torch",
        r"roberta\.encoder\.layer\.\d+\.attention\.self\.LayerNorm\.(weight|bias|gamma|beta)",
        "made but never used by the efficient-MLM authors' port",
    ),
    (
        "fairseq",
        r"encoder\.sentence_encoder\.version",
        "of the code; from 2 on, a norm is behind the layers",
    ),
    (
        "fairseq",
        r"encoder\.sentence_encoder\.layers\.\d+\.(in_proj|out_proj|fc1|fc2)_(weight|bias)",
        "stale copies that version 0.12 has for the sake of post-LN models, and makes anew when it loads a file",
    ),
)
"""(family, whole path and leaf, reason)."""

OLD_LEAVES: Final = {
    ("torch", "norm", "gamma"): ("weight", "PyTorch files that were converted from TensorFlow 1"),
    ("torch", "norm", "beta"): ("bias", "PyTorch files that were converted from TensorFlow 1"),
    ("tf", "table", "weight"): ("weight", "transformers names the word table so, and accepts it for the other tables"),
}
"""(family, kind of module, stored leaf) to (canonical leaf, reason), beside the leaves of `schema.LEAVES`."""

FAIRSEQ_LAYER: Final = "encoder.sentence_encoder.layers.{i}"

FAIRSEQ: Final = {
    f"{PREFIX}.embeddings.word_embeddings": "encoder.sentence_encoder.embed_tokens",
    f"{PREFIX}.embeddings.position_embeddings": "encoder.sentence_encoder.embed_positions",
    f"{PREFIX}.embeddings.LayerNorm": "encoder.sentence_encoder.layernorm_embedding",
    f"{LAYER}.attention.LayerNorm": f"{FAIRSEQ_LAYER}.self_attn_layer_norm",
    f"{LAYER}.attention.self.query": f"{FAIRSEQ_LAYER}.self_attn.q_proj",
    f"{LAYER}.attention.self.key": f"{FAIRSEQ_LAYER}.self_attn.k_proj",
    f"{LAYER}.attention.self.value": f"{FAIRSEQ_LAYER}.self_attn.v_proj",
    f"{LAYER}.attention.output.dense": f"{FAIRSEQ_LAYER}.self_attn.out_proj",
    f"{LAYER}.intermediate.LayerNorm": f"{FAIRSEQ_LAYER}.final_layer_norm",  # final in its layer, not in the model
    f"{LAYER}.intermediate.dense": f"{FAIRSEQ_LAYER}.fc1",
    f"{LAYER}.output.dense": f"{FAIRSEQ_LAYER}.fc2",
    f"{PREFIX}.LayerNorm": "encoder.sentence_encoder.layer_norm",
    "lm_head.dense": "encoder.lm_head.dense",
    "lm_head.layer_norm": "encoder.lm_head.layer_norm",
    "lm_head": "encoder.lm_head",
    "lm_head.decoder": "encoder.lm_head",  # no module of its own; present, and the word table, when tied
    "classifier.dense": "classification_heads.{name}.dense",
    "classifier.out_proj": "classification_heads.{name}.out_proj",
}
"""Path here to path in fairseq; the leaves are the same. A file may hold several classification heads, by name."""

FAIRSEQ_HEAD: Final = "sentence_classification_head"
"""The name of the classification head that fairseq's task of sentences makes, unless it is told another."""

FAIRSEQ_OLD: Final = (
    (r"^decoder\.", ("encoder.",), "versions whose models of one stack were all decoders"),
    (r"\.emb_layer_norm\.", (".layernorm_embedding.",), "the encoder that was RoBERTa's alone"),
    (r"(\.layers\.\d+)\.layer_norms\.0\.", (r"\1.self_attn_layer_norm.",), "the first encoders"),
    (r"(\.layers\.\d+)\.layer_norms\.1\.", (r"\1.final_layer_norm.",), "the first encoders"),
    (
        r"\.self_attn\.in_proj_(weight|bias)$",
        (r".self_attn.q_proj.\1", r".self_attn.k_proj.\1", r".self_attn.v_proj.\1"),
        "the first attention held query, key and value in one tensor, as three equal parts of its rows",
    ),
    *(
        (rf"(\.layers\.\d+)\.{stored}{leaf[0]}$", tuple(rf"\1.{path}.{leaf}" for path in paths), "DeepSpeed's layer")
        for stored, paths in {
            "attn_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "attn_o": ("self_attn.out_proj",),
            "norm_": ("self_attn_layer_norm",),
            "attn_n": ("final_layer_norm",),  # the one behind the attention block
            "inter_": ("fc1",),
            "output_": ("fc2",),
        }.items()
        for leaf in ("weight", "bias")
    ),
)
"""(part of an old name, today's in its place, where it is from); three for a tensor that is three today."""


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
    """The canonical name of a stored one (or a second name, a key of `schema.TIES`); None when no rule knows it.

    Of fairseq's names it knows today's, which `fairseq_today` gives.
    """
    if family == "fairseq":
        return _canonical_of_fairseq(stored)
    path, _, leaf_name = _path(family, stored).rpartition(".")
    for families, start, replacement, _ in PREFIXES:
        if family not in families or not path.startswith(start):
            continue
        module = replacement + path.removeprefix(start)
        if f"{module}.{leaf_name}" in TIES and leaf_name == "bias":
            return Name(f"{module}.{leaf_name}")
        leaf = _leaf(family, _KINDS.get(_template(module), ()), leaf_name)
        if leaf is not None:
            return Name(f"{module}.{leaf.name}", _transposed(family, leaf))
    return None


def dropped(family: Family, stored: str) -> bool:
    """Whether a stored name is known to hold nothing that a model needs."""
    return any(family == owner and re.fullmatch(pattern, stored) for owner, pattern, _ in DROPPED)


def fairseq_today(stored: str) -> list[str]:
    """What fairseq has today for a name in its files: one name, or those of the three equal parts of the rows."""
    found = [stored]
    for pattern, replacements, _ in FAIRSEQ_OLD:
        if re.search(pattern, found[0]):
            found = [re.sub(pattern, replacement, name) for name in found for replacement in replacements]
    return found


def stored(family: Family, name: str, head: str) -> Name:
    """How a family stores a canonical name, or a key of `schema.TIES`, in files of one head.

    TensorFlow's and Flax's paths are joined by slashes, the others' by dots.

    Raises:
        ValueError: when the family has no such parameter.
    """
    if family == "torch":
        return Name(schema.path(name, head))
    path, _, leaf_name = name.rpartition(".")
    if family == "fairseq":
        template = FAIRSEQ.get(_template(path))
        if template is None:
            raise ValueError(f"fairseq has no parameter {name}")
        layer = re.search(r"\.layer\.(\d+)\.", path)
        return Name(f"{template.format(i=layer and layer[1], name=FAIRSEQ_HEAD)}.{leaf_name}")
    kinds = _KINDS[_template(path)]
    leaf = next(leaf for kind in kinds for leaf in LEAVES[kind] if leaf.name == leaf_name)
    if family == "flax":
        return Name(f"{schema.path(path, head)}.{leaf.flax}".replace(".", "/"), leaf.transposed)
    tf_leaf = "weight" if path.endswith(".word_embeddings") else leaf.tf
    slashes = re.sub(r"/layer/(\d+)/", r"/layer_._\1/", path.replace(".", "/"))
    return Name(f"{slashes}/{tf_leaf}:0", leaf.transposed)


def _canonical_of_fairseq(stored: str) -> Name | None:
    path, _, leaf = stored.rpartition(".")
    for module, pattern in _FAIRSEQ_PATTERNS.items():
        match = pattern.fullmatch(path)
        if match and _leaf("fairseq", _KINDS[module], leaf) is not None:
            return Name(f"{module.format(i=match.groupdict().get('i'))}.{leaf}")
    return None


def _path(family: Family, stored: str) -> str:
    """A stored name with dots between its components, and layers numbered by a component of their own."""
    if family == "tf":
        return stored.removesuffix(":0").replace("/layer_._", "/layer/").replace("/", ".")
    return stored.replace("/", ".") if family == "flax" else stored


def _template(path: str) -> str:
    return re.sub(r"\.layer\.(0|[1-9][0-9]*)\.", ".layer.{i}.", path)


def _leaf(family: Family, kinds: Iterable[Kind], name: str) -> Leaf | None:
    for kind in kinds:
        old = OLD_LEAVES.get((family, kind, name))
        for leaf in LEAVES[kind]:
            spelled = {"tf": leaf.tf, "flax": leaf.flax}.get(family, leaf.name)
            if name == spelled or (old is not None and old[0] == leaf.name):
                return leaf
    return None


def _transposed(family: Family, leaf: Leaf) -> bool:
    return leaf.transposed and family != "torch"


_KINDS: Final[dict[str, list[Kind]]] = {
    name: list(dict.fromkeys(module.kind for module in MODULES if module.name == name))
    for name in dict.fromkeys(module.name for module in MODULES)
}
"""What a module of each name may be; the activation is of one kind or another."""

_FAIRSEQ_PATTERNS: Final = {
    module: re.compile(
        re.escape(path).replace(r"\{i\}", "(?P<i>0|[1-9][0-9]*)").replace(r"\{name\}", r"[^.]+"),
    )
    for module, path in FAIRSEQ.items()
}
