"""The three packages read alike: same files, same classes and functions in the same order, same methods.

The sources are parsed, so no framework is needed. What the frameworks force to differ is listed here, with reasons.
"""

import ast
from pathlib import Path

import pytest

import roberta_pln
from roberta_pln import schema

ROOT = Path(roberta_pln.__file__).parent
BACKENDS = ("pt", "tf", "flax")

SPELLED_PT = {"call": "forward", "__call__": "forward", "setup": "__init__"}
"""How Keras and Linen call what PyTorch calls otherwise."""

EXTRA = {
    "pt": {
        "MultiHeadAttention.is_plain",  # only PyTorch has a fused kernel beside the written-out form
    },
    "tf": {
        "mish",  # TensorFlow has none
        "Attention.output",  # Keras has an attribute of this name, so the layer is held under another
        "Layer.output",
        "RobertaPreLayerNormModel.get_config",  # what Keras needs to construct a model again
        "base_model",  # a model inside a model shares its policy and generator, and is initialised by the outer one
        # What fit() uses, in a method of its own.
        *(f"RobertaPreLayerNorm{head}.own_loss" for head in schema.HEADS),
    },
    "flax": {
        "Layers",  # Linen needs a module for the path component `layer`
        # A Linen module holds no parameters, so a class beside it does, and calls it.
        *map(schema.architecture, schema.HEADS),
    },
}
MODULES = {f"{schema.architecture(head)}Module": schema.architecture(head) for head in schema.HEADS}
MODULES["RobertaPreLayerNormModule"] = MODULES.pop("RobertaPreLayerNormModelModule")
"""Linen modules that stand for the classes of the other two packages."""

FILES = ("activations", "embeddings", "attention", "encoder", "model", "heads", "losses", "records", "probe")
COMMON = {
    "weights": ["get", "check", "initialize", "load", "dump"],
    "pretrained": [
        "RobertaPreLayerNormPreTrainedModel",
        "RobertaPreLayerNormPreTrainedModel.__init__",
        "RobertaPreLayerNormPreTrainedModel.from_pretrained",
        "RobertaPreLayerNormPreTrainedModel.save_pretrained",
        "RobertaPreLayerNormPreTrainedModel.parameters_of_schema",
        "RobertaPreLayerNormPreTrainedModel.num_parameters",
    ],
}
"""Files that meet the framework head on; these names come in this order, with others between them."""


def outline(backend: str, file: str) -> list[str]:
    """Classes, methods and functions of a file in order, spelled as in `pt`, without the extras."""
    names = []
    for node in ast.parse((ROOT / backend / f"{file}.py").read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name in EXTRA[backend]:
            continue
        name = MODULES.get(node.name, node.name)
        names.append(name)
        for item in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(item, ast.FunctionDef) and f"{name}.{item.name}" not in EXTRA[backend]:
                names.append(f"{name}.{SPELLED_PT.get(item.name, item.name)}")
    return names


def test_same_files():
    listings = {backend: {path.name for path in (ROOT / backend).glob("*.py")} for backend in BACKENDS}
    own = {"tf": {"layers.py"}, "flax": {"layers.py"}}  # what torch.nn is for PyTorch
    for backend in BACKENDS:
        assert listings[backend] - own.get(backend, set()) == listings["pt"]


@pytest.mark.parametrize("backend", ["tf", "flax"])
@pytest.mark.parametrize("file", FILES)
def test_same_outline(backend, file):
    assert outline(backend, file) == outline("pt", file)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("file", COMMON)
def test_common_core(backend, file):
    assert [name for name in outline(backend, file) if name in COMMON[file]] == COMMON[file]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_extra_is_there(backend):
    """An exemption that is no longer needed goes."""
    text = "".join((ROOT / backend / f"{file}.py").read_text(encoding="utf-8") for file in FILES)
    for extra in EXTRA[backend]:
        name = extra.rpartition(".")[2]
        assert f"class {name}(" in text or f"def {name}(" in text, extra


def arguments(backend: str, name: str) -> set[str]:
    """Names of the arguments of a model's call."""
    file = "model" if name.endswith("Model") else "heads"
    for node in ast.parse((ROOT / backend / f"{file}.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and SPELLED_PT.get(item.name, item.name) == "forward":
                    return {argument.arg for argument in (*item.args.args, *item.args.kwonlyargs)}
    raise KeyError(name)


OWN_ARGUMENTS = {"pt": set(), "tf": {"training"}, "flax": {"params", "dropout_rng", "train"}}
"""How dropout is switched on and where parameters and random keys come from."""


@pytest.mark.parametrize("backend", ["tf", "flax"])
@pytest.mark.parametrize("name", [schema.architecture(head) for head in schema.HEADS])
def test_same_arguments(backend, name):
    assert arguments(backend, name) == arguments("pt", name) | OWN_ARGUMENTS[backend]
