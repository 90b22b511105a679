"""The table of parameters: every module of every head, its kind, its axes, its initialiser, and when it exists.

A parameter's canonical name is its attribute path in all three backends and its name on disk. Construction checks,
loading, saving, conversion and tests read this table; nothing else lists parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from roberta_pln import numerics
from roberta_pln.config import RobertaPreLayerNormConfig

Kind = Literal["table", "dense", "projection", "norm", "bias", "prelu", "xielu"]
Initializer = float | Literal["normal"]

PREFIX: Final = "roberta_prelayernorm"
"""Attribute of every head that holds the base model, and first component of the base model's names on disk."""

HEADS: Final = (
    "Model",
    "ForCausalLM",
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForMultipleChoice",
    "ForTokenClassification",
    "ForQuestionAnswering",
)
"""The heads, named as their classes are without the leading `RobertaPreLayerNorm`."""

LM_HEADS: Final = ("ForCausalLM", "ForMaskedLM")
POOLED_HEADS: Final = ("Model", "ForMultipleChoice")


@dataclass(frozen=True)
class Leaf:
    """How one array of a module is stored.

    Attributes:
        name: canonical name, which is PyTorch's.
        tf, flax: name in the other two.
        initializer: how a fresh one is filled: with this number, or for `normal` with draws from a normal distribution
            whose standard deviation is `initializer_range`.
        transposed: whether those two hold the transpose.
    """

    name: str
    tf: str
    flax: str
    initializer: Initializer
    transposed: bool = False


LEAVES: Final[dict[Kind, tuple[Leaf, ...]]] = {
    "table": (Leaf("weight", "embeddings", "embedding", "normal"),),
    "dense": (Leaf("weight", "kernel", "kernel", "normal", transposed=True), Leaf("bias", "bias", "bias", 0.0)),
    "projection": (Leaf("weight", "kernel", "kernel", "normal", transposed=True),),
    "norm": (Leaf("weight", "gamma", "scale", 1.0), Leaf("bias", "beta", "bias", 0.0)),
    "bias": (Leaf("bias", "bias", "bias", 0.0),),
    "prelu": (Leaf("weight", "alpha", "negative_slope", numerics.PRELU_START),),
    "xielu": (
        Leaf("alpha_p", "alpha_p", "alpha_p", numerics.XIELU_START_P),
        Leaf("alpha_n", "alpha_n", "alpha_n", numerics.XIELU_START_N),
    ),
}

XIELU_CONSTANTS: Final = {"beta": numerics.XIELU_BETA, "eps": -1e-6}
"""What transformers keeps and saves beside the parameters of `xielu`, as tensors without axes. It replaces inputs
between eps and zero by eps where it takes their exponential, for the sake of its CUDA kernel; nothing here does."""

Condition = Callable[[RobertaPreLayerNormConfig, str], bool]


def always(config: RobertaPreLayerNormConfig, head: str) -> bool:
    """Every model has it."""
    return True


def relative(config: RobertaPreLayerNormConfig, head: str) -> bool:
    """Models with relative positions have it."""
    return config.position_embedding_type != "absolute"


def cross(config: RobertaPreLayerNormConfig, head: str) -> bool:
    """Decoders with cross-attention have it."""
    return config.add_cross_attention


def acts(name: str) -> Condition:
    """Models with that activation have it."""
    return lambda config, head: config.hidden_act == name


def in_heads(*heads: str) -> Condition:
    """The named heads have it."""
    return lambda config, head: head in heads


def untied(config: RobertaPreLayerNormConfig, head: str) -> bool:
    """Language-model heads have it when their decoder does not share the word table."""
    return head in LM_HEADS and not config.tie_word_embeddings


@dataclass(frozen=True)
class Module:
    """One row of the table: a module, or one per layer where `{i}` stands in its name.

    Attributes:
        name: attribute path in every backend.
        kind: which arrays it holds, see `LEAVES`.
        axes: sizes as the names of config fields and properties (or what `_size` makes of them); for dense modules
            and projections (out, in).
        when: whether a config's head has it.
        padding: whether row `pad_token_id` is zero at first and gets no gradient from lookups.
    """

    name: str
    kind: Kind
    axes: tuple[str, ...]
    when: Condition = always
    padding: bool = False


def _attention(name: str, when: Condition = always) -> tuple[Module, ...]:
    return (
        Module(f"{name}.LayerNorm", "norm", ("hidden_size",), when),
        Module(f"{name}.self.query", "dense", ("attention_size", "hidden_size"), when),
        Module(f"{name}.self.key", "dense", ("attention_size", "hidden_size"), when),
        Module(f"{name}.self.value", "dense", ("attention_size", "hidden_size"), when),
        Module(f"{name}.output.dense", "dense", ("hidden_size", "attention_size"), when),
    )


LAYER: Final = PREFIX + ".encoder.layer.{i}"

MODULES: Final[tuple[Module, ...]] = (
    Module(f"{PREFIX}.embeddings.word_embeddings", "table", ("vocab_size", "hidden_size"), padding=True),
    Module(
        f"{PREFIX}.embeddings.position_embeddings", "table", ("max_position_embeddings", "hidden_size"), padding=True
    ),
    Module(f"{PREFIX}.embeddings.token_type_embeddings", "table", ("type_vocab_size", "hidden_size")),
    Module(f"{PREFIX}.embeddings.LayerNorm", "norm", ("hidden_size",)),
    *_attention(f"{LAYER}.attention"),
    Module(f"{LAYER}.attention.self.distance_embedding", "table", ("distances", "head_size"), relative),
    *_attention(f"{LAYER}.crossattention", cross),
    Module(f"{LAYER}.intermediate.LayerNorm", "norm", ("hidden_size",)),
    Module(f"{LAYER}.intermediate.dense", "dense", ("intermediate_size", "hidden_size")),
    Module(f"{LAYER}.intermediate.intermediate_act_fn", "prelu", ("one",), acts("prelu")),
    Module(f"{LAYER}.intermediate.intermediate_act_fn", "xielu", ("one",), acts("xielu")),
    Module(f"{LAYER}.output.dense", "dense", ("hidden_size", "activated_size")),
    Module(f"{PREFIX}.LayerNorm", "norm", ("hidden_size",)),
    Module(f"{PREFIX}.pooler.dense", "dense", ("hidden_size", "hidden_size"), in_heads(*POOLED_HEADS)),
    Module("lm_head.dense", "dense", ("hidden_size", "hidden_size"), in_heads(*LM_HEADS)),
    Module("lm_head.layer_norm", "norm", ("hidden_size",), in_heads(*LM_HEADS)),
    Module("lm_head", "bias", ("vocab_size",), in_heads(*LM_HEADS)),
    Module("lm_head.decoder", "projection", ("vocab_size", "hidden_size"), untied),
    Module("classifier.dense", "dense", ("hidden_size", "hidden_size"), in_heads("ForSequenceClassification")),
    Module("classifier.out_proj", "dense", ("num_labels", "hidden_size"), in_heads("ForSequenceClassification")),
    Module("classifier", "dense", ("num_labels", "hidden_size"), in_heads("ForTokenClassification")),
    Module("classifier", "dense", ("one", "hidden_size"), in_heads("ForMultipleChoice")),
    Module("qa_outputs", "dense", ("num_labels", "hidden_size"), in_heads("ForQuestionAnswering")),
)

TIES: Final[dict[str, str]] = {
    "lm_head.decoder.bias": "lm_head.bias",
    "lm_head.decoder.weight": f"{PREFIX}.embeddings.word_embeddings.weight",
}
"""Second names of shared parameters. The bias is always one parameter; the weight is one unless the config unties."""


@dataclass(frozen=True)
class Parameter:
    """One array of one model.

    Attributes:
        name: canonical name, always with the base model's prefix.
        shape: canonical shape, which is PyTorch's.
        module: the row it comes from.
        leaf: which array of that module.
    """

    name: str
    shape: tuple[int, ...]
    module: Module
    leaf: Leaf

    @property
    def initializer(self) -> Initializer:
        """How a fresh one is filled, see `Leaf`."""
        return self.leaf.initializer

    @property
    def size(self) -> int:
        """Number of elements."""
        size = 1
        for length in self.shape:
            size *= length
        return size


def expand(config: RobertaPreLayerNormConfig, head: str, add_pooling_layer: bool = True) -> dict[str, Parameter]:
    """Every parameter of one head, by canonical name, in the order of the forward pass.

    Args:
        config: the model's config.
        head: one of `HEADS`.
        add_pooling_layer: `False` leaves the base model's pooler out.

    Raises:
        ValueError: when `head` is not one of `HEADS`.
    """
    check_head(head)
    parameters: dict[str, Parameter] = {}
    for module in _unrolled(config):
        if not module.when(config, head) or (not add_pooling_layer and ".pooler." in module.name):
            continue
        shape = tuple(_size(config, axis, module.name) for axis in module.axes)
        for leaf in LEAVES[module.kind]:
            name = f"{module.name}.{leaf.name}"
            parameters[name] = Parameter(
                name=name,
                shape=shape if leaf.name == "weight" and module.kind != "norm" else shape[:1],
                module=module,
                leaf=leaf,
            )
    return parameters


def select(parameters: Mapping[str, Parameter], paths: Iterable[str]) -> list[Parameter]:
    """The parameters at or below some paths, such as `roberta_prelayernorm.embeddings` or `lm_head`.

    Raises:
        ValueError: when a path leads to no parameter.
    """
    chosen: dict[str, Parameter] = {}
    for start in paths:
        found = {name: value for name, value in parameters.items() if f"{name}.".startswith(f"{start}.")}
        if not found:
            modules = ", ".join(dict.fromkeys(name.split(".")[0] for name in parameters))
            raise ValueError(f"no parameter is at or below {start!r}; give paths of canonical names, below {modules}")
        chosen |= found
    return list(chosen.values())


def path(name: str, head: str) -> str:
    """The attribute path of a canonical name in one head's class; the base model's own paths have no prefix."""
    return name.removeprefix(f"{PREFIX}.") if head == "Model" else name


def check_head(head: str) -> None:
    """Raise ValueError when `head` is not one of `HEADS`."""
    if head not in HEADS:
        raise ValueError(f"unknown head {head!r}; the heads are {', '.join(HEADS)}")


def ties(config: RobertaPreLayerNormConfig, head: str) -> dict[str, str]:
    """Second names that this head's parameters have: alias to canonical name."""
    if head not in LM_HEADS:
        return {}
    return {alias: name for alias, name in TIES.items() if config.tie_word_embeddings or alias.endswith(".bias")}


def constants(config: RobertaPreLayerNormConfig) -> dict[str, float]:
    """Numbers that are no parameters, by the names under which PyTorch's files hold them beside the parameters."""
    if config.hidden_act != "xielu":
        return {}
    return {
        f"{LAYER.format(i=i)}.intermediate.intermediate_act_fn.{leaf}": value
        for i in range(config.num_hidden_layers)
        for leaf, value in XIELU_CONSTANTS.items()
    }


def head_of(architectures: list[str] | None) -> str | None:
    """The head that the class names of a `config.json` name, or None when they name none of ours."""
    for architecture in architectures or ():
        head = architecture.removeprefix("TF").removeprefix("Flax").removeprefix("RobertaPreLayerNorm")
        if head in HEADS:
            return head
    return None


def architecture(head: str) -> str:
    """The class name that `config.json` gives a head."""
    return f"RobertaPreLayerNorm{head}"


def _unrolled(config: RobertaPreLayerNormConfig) -> list[Module]:
    """The rows in the order of the forward pass, with `{i}` replaced by each layer's number."""
    first = next(index for index, module in enumerate(MODULES) if "{i}" in module.name)
    layered = [module for module in MODULES if "{i}" in module.name]
    layers = [
        Module(module.name.format(i=i), module.kind, module.axes, module.when, module.padding)
        for i in range(config.num_hidden_layers)
        for module in layered
    ]
    return [*MODULES[:first], *layers, *MODULES[first + len(layered) :]]


def _size(config: RobertaPreLayerNormConfig, axis: str, name: str) -> int:
    if axis == "one":
        return 1
    if axis == "distances":
        return 2 * config.max_position_embeddings - 1
    if axis == "attention_size":  # pruning removes heads from self-attention only
        layer = int(name.removeprefix(f"{PREFIX}.encoder.layer.").split(".")[0])
        heads = config.num_attention_heads if ".crossattention." in name else len(config.kept_heads(layer))
        return heads * config.head_size
    size = getattr(config, axis)
    assert isinstance(size, int)
    return size
