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
        "MultiHeadAttention.takes_turns",  # XLA fuses scores with what is made of them
        # A function with a gradient of its own is a class here.
        *("InTurns", "Turn", "each_turn", "together", "differentiable"),
        "MultiHeadAttention.keep",  # Linen makes its modules anew for every call
        "Cache",  # transformers' caches have methods in PyTorch only
        "kind_of",  # only PyTorch shards a module by changing its class
        # XLA compiles for one number of tokens, whatever that of labels is.
        *("RobertaPreLayerNormForMaskedLM.places", "labelled_places", "labels_at"),
        "readable",  # beside the layers in Flax; TensorFlow's eager tensors tell it themselves
        *("Decoded", "Scaled", "is_one"),  # see above
        # XLA adds the gradients of lookup and decoder up in one array by itself, and TensorFlow copies the first.
        *("Embeddings.look_up_tokens", "table_handed_on", "LookUp", "shared_table"),
    },
    "tf": {
        "mish",  # TensorFlow has none
        # PyTorch has one kernel for gelu and one for its gradient, and XLA makes one of many operations.
        *("gelu_behind_a_product", "gelu_gradient", "gelu_in_training", "in_training"),
        *("in_one_pass", "can_compile"),
        *("RobertaPreLayerNormForMaskedLM.places", "labelled_places", "labels_at"),  # see above
        *("decoded", "refuse"),  # with a gradient of its own
        *("MultiHeadAttention.takes_turns", "in_turns", "turns"),  # see above
        "MultiHeadAttention.keep",  # Linen makes its modules anew for every call
        "Attention.output",  # Keras has an attribute of this name, so the layer is held under another
        "Layer.output",
        "RobertaPreLayerNormModel.get_config",  # what Keras needs to construct a model again
        "BaseModelOutput",  # the order of fields that TensorFlow users know
        "base_model",  # a model inside a model shares its policy and generator, and is initialised by the outer one
        # What fit() uses, in a method of its own.
        *(f"RobertaPreLayerNorm{head}.own_loss" for head in schema.HEADS),
    },
    "flax": {
        "Layers",  # Linen needs a module for the path component `layer`
        *("decoded", "decoded_forward", "decoded_backward"),  # with a gradient of its own
        "plus_product",  # the other two add a product to a sum without having both at once
        # A Linen module holds no parameters, so a class beside it does, and calls it.
        *map(schema.architecture, schema.HEADS),
    },
}
MODULES = {f"{schema.architecture(head)}Module": schema.architecture(head) for head in schema.HEADS}
MODULES["RobertaPreLayerNormModule"] = MODULES.pop("RobertaPreLayerNormModelModule")
"""Linen modules that stand for the classes of the other two packages."""

FILES = ("activations", "embeddings", "attention", "encoder", "model", "heads", "losses", "records", "probe", "policy")
COMMON = {
    "weights": ["owner", "get", "check", "initialize", "load", "dump"],
    "pretrained": [
        "RobertaPreLayerNormPreTrainedModel",
        "RobertaPreLayerNormPreTrainedModel.__init__",
        "RobertaPreLayerNormPreTrainedModel.from_pretrained",
        "RobertaPreLayerNormPreTrainedModel.save_pretrained",
        "RobertaPreLayerNormPreTrainedModel.parameters_of_schema",
        "RobertaPreLayerNormPreTrainedModel.num_parameters",
        "RobertaPreLayerNormPreTrainedModel.tie_weights",
        "RobertaPreLayerNormPreTrainedModel.freeze",
        "RobertaPreLayerNormPreTrainedModel.unfreeze",
        "RobertaPreLayerNormPreTrainedModel.get_input_embeddings",
        "RobertaPreLayerNormPreTrainedModel.set_input_embeddings",
        "RobertaPreLayerNormPreTrainedModel.get_output_embeddings",
        "RobertaPreLayerNormPreTrainedModel.set_output_embeddings",
        "RobertaPreLayerNormPreTrainedModel.set_table",
        "RobertaPreLayerNormPreTrainedModel.resize_token_embeddings",
        "RobertaPreLayerNormPreTrainedModel.prune_heads",
        "RobertaPreLayerNormPreTrainedModel.reshape",
        "RobertaPreLayerNormPreTrainedModel.path",
    ],
    "training": [
        "Trainer",
        "Trainer.__init__",
        "Trainer.build",
        "Trainer.is_main",
        "Trainer.wait",
        "Trainer.step",
        "Trainer.predict",
        "Trainer.snapshot",
        "Trainer.restore",
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
    own = {
        "pt": {"packed.py"},  # weights in the order of a kernel that only PyTorch has
        "tf": {"optimizers.py", "serving.py"},  # what torch.optim is; what `export` writes
        "flax": {"sharding.py"},  # meshes of devices
    }
    for backend in BACKENDS:
        assert listings[backend] - own[backend] == listings["pt"] - own["pt"]


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


OWN_ARGUMENTS = {
    "pt": {
        "device",  # a part of every tensor's making
        "parallel",  # of a trainer, where the others take an object of the framework
        "gradient_checkpointing_kwargs",  # transformers has it in PyTorch only
        "key",  # of is_recomputed: how long it is does not matter in Flax
        *("model", "parameter", "tensor"),  # of weights.get and to_array: a tree of arrays is what Flax has there
    },
    "tf": {
        "strategy",  # what TensorFlow and Keras share work by
        "shared",  # the policy and the generator, which PyTorch has in the parameters and globally
        "training",  # as every call of Keras
        "seed",
        "word_embeddings",  # PyTorch ties by sharing the parameter, the others by handing the table over
        "use_cache",  # what a layer that is recomputed returns is kept, so it returns no more than is asked for
        "first",  # a cache of fixed size has more slots than tokens
    },
    "flax": {
        *("params", "path", "array", "input_shape", "_do_init"),  # parameters are outside of the model
        *("rng", "dropout_rng", "seed", "train", "deterministic", "key_of_dropout"),  # and so are random keys
        *("dtype", "param_dtype"),  # parameters do not tell the type of the computation
        "gradient_checkpointing",  # a field of the module
        "word_embeddings",
        *("first", "tokens"),  # a cache of fixed size has more slots than tokens
    },
}
"""Arguments that the other packages lack, with reasons."""


def functions(backend: str, file: str) -> dict[str, set[str]]:
    """Functions and methods of a file, spelled as in `pt`, with the names of their arguments."""
    found = {}
    for node in ast.parse((ROOT / backend / f"{file}.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        for item in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(item, ast.FunctionDef):
                name = f"{MODULES.get(node.name, node.name)}.{SPELLED_PT.get(item.name, item.name)}"
                found[name] = item if node.name not in EXTRA[backend] else found.get(name, item)
    return {
        name: {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)} for name, node in found.items()
    }


@pytest.mark.parametrize("backend", ["tf", "flax"])
@pytest.mark.parametrize("file", [*FILES, *COMMON])
def test_same_arguments(backend, file):
    """Of every function that two packages share; Linen's setup has none, since fields take their place."""
    ours, theirs = functions("pt", file), functions(backend, file)
    shared = [name for name in ours if name in theirs and not (backend == "flax" and name.endswith("__init__"))]
    if file == "training":  # what a trainer is made of is each framework's own
        shared = [name for name in shared if name in COMMON[file]]
    assert shared or not ours
    for name in shared:
        assert ours[name] - theirs[name] <= OWN_ARGUMENTS["pt"], name
        assert theirs[name] - ours[name] <= OWN_ARGUMENTS[backend], name


@pytest.mark.parametrize("head", schema.HEADS)
def test_flax_classes_call_their_modules(head):
    """A class takes what its module takes, with parameters and keys in place of the module's switch."""
    source = (ROOT / "flax" / ("model.py" if head == "Model" else "heads.py")).read_text(encoding="utf-8")
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    name = schema.architecture(head)
    calls = [
        next(item for item in classes[found].body if isinstance(item, ast.FunctionDef) and item.name == "__call__")
        for found in (name, "RobertaPreLayerNormModule" if head == "Model" else f"{name}Module")
    ]
    own, module = ({argument.arg for argument in (*call.args.args, *call.args.kwonlyargs)} for call in calls)
    assert own == module - {"deterministic"} | {"params", "dropout_rng", "train"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_own_argument_is_there(backend):
    there = set().union(*(names for file in (*FILES, *COMMON) for names in functions(backend, file).values()))
    assert OWN_ARGUMENTS[backend] <= there


def test_another_argument_is_seen(monkeypatch):
    """The control."""
    monkeypatch.setitem(OWN_ARGUMENTS, "tf", OWN_ARGUMENTS["tf"] - {"training"})
    with pytest.raises(AssertionError, match="RobertaPreLayerNormModel.forward"):
        test_same_arguments("tf", "model")
