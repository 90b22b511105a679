"""The rules of strict loading."""

import warnings

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from roberta_pln import checkpoint, loading, schema
from roberta_pln.config import DTYPES
from roberta_pln.loading import LoadError, prepare
from tests.contract import random_tensors, tiny_config

CONFIG = tiny_config(hidden_size=8, intermediate_size=12)
R = schema.PREFIX
FINAL = f"{R}.LayerNorm.weight"


def write(folder, head, config=CONFIG, drop=(), dtype=np.float32, **extra):
    """A checkpoint with some tensors dropped, and others added or replaced (`__` stands for a dot)."""
    tensors = {name: array.astype(dtype) for name, array in random_tensors(config, head).items()}
    checkpoint.save(tensors, folder, config, head)
    for name in drop:
        del tensors[name]
    tensors |= {name.replace("__", "."): array for name, array in extra.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("head", schema.HEADS)
def test_whole_checkpoint(tmp_path, head):
    loaded = prepare(write(tmp_path, head), head)
    assert loaded.info == loading.LoadingInfo()
    assert (loaded.head, loaded.dtype, loaded.config.dtype) == (head, "float32", "float32")
    expected = random_tensors(CONFIG, head)
    assert list(loaded.parameters) == list(expected)
    for parameter, array in loaded.tensors():
        assert array.shape == parameter.shape
        assert np.array_equal(array, expected.pop(parameter.name))
    assert not expected


NEW = {  # (saved head, loaded head): start of the parameters that are new
    ("ForMaskedLM", "Model"): (f"{R}.pooler.",),
    ("ForMaskedLM", "ForCausalLM"): (),
    ("ForMaskedLM", "ForSequenceClassification"): ("classifier.",),
    ("ForMaskedLM", "ForMultipleChoice"): (f"{R}.pooler.", "classifier."),
    ("Model", "ForMaskedLM"): ("lm_head.",),
    ("Model", "ForQuestionAnswering"): ("qa_outputs.",),
    ("ForTokenClassification", "ForSequenceClassification"): ("classifier.",),
    ("ForSequenceClassification", "ForTokenClassification"): ("classifier.",),
}


@pytest.mark.parametrize(("saved", "head"), NEW)
def test_new_heads_are_named(tmp_path, saved, head):
    write(tmp_path, saved)
    starts = NEW[saved, head]
    if starts:
        with pytest.warns(UserWarning, match="newly initialised: ") as caught:
            loaded = prepare(tmp_path, head)
        assert len(caught) == 1
        assert all(name in str(caught[0].message) for name in loaded.info.missing_keys)
    else:
        loaded = prepare(tmp_path, head)
    assert set(loaded.info.missing_keys) == {name for name in loaded.parameters if name.startswith(starts or "-")}
    assert set(loaded.info.unexpected_keys) == set(random_tensors(CONFIG, saved)) - set(loaded.parameters)
    read = {parameter.name for parameter, _ in loaded.tensors()}
    assert read == set(loaded.parameters) - set(loaded.info.missing_keys)


def test_pooler_may_be_left_out(tmp_path):
    loaded = prepare(write(tmp_path, "Model"), "Model", add_pooling_layer=False)
    assert set(loaded.info.unexpected_keys) == {f"{R}.pooler.dense.weight", f"{R}.pooler.dense.bias"}


BROKEN = {  # what is wrong with the file, and what the error must say
    "missing": ({"drop": [FINAL]}, {}, [f"missing: {FINAL}"]),
    "part of a head": ({"drop": ["lm_head.bias"]}, {}, ["missing: lm_head.bias"]),
    "unexpected": ({"step": np.ones(1)}, {}, ["unexpected: step"]),
    "shape": ({"lm_head__bias": np.ones(5, np.float32)}, {}, ["shape of lm_head.bias: (5,) in the checkpoint, (99,)"]),
    "fewer layers": ({}, {"num_hidden_layers": 1}, [f"unexpected: {R}.encoder.layer.1.output.dense.bias"]),
    "more layers": ({}, {"num_hidden_layers": 3}, [f"missing: {R}.encoder.layer.2.output.dense.bias"]),
    "cross-attention": ({}, {"is_decoder": True, "add_cross_attention": True}, ["1.crossattention.LayerNorm.bias"]),
    "untied": ({}, {"tie_word_embeddings": False}, ["missing: lm_head.decoder.weight"]),
    "several": (
        {"drop": [FINAL], "step": np.ones(1), "lm_head__bias": np.ones(5, np.float32)},
        {},
        [f"missing: {FINAL}", "unexpected: step", "shape of lm_head.bias"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_all_problems_in_one_error(tmp_path, name):
    changes, overrides, texts = BROKEN[name]
    write(tmp_path, "ForMaskedLM", **changes)
    with pytest.raises(LoadError, match=r"the config and the weights of .* disagree") as caught:
        prepare(tmp_path, "ForMaskedLM", **overrides)
    assert all(text in str(caught.value) for text in texts)


@pytest.mark.parametrize("name", BROKEN)
def test_not_strict_names_everything(tmp_path, name):
    changes, overrides, _ = BROKEN[name]
    write(tmp_path, "ForMaskedLM", **changes)
    with pytest.warns(UserWarning, match="newly initialised|not used") as caught:
        loaded = prepare(tmp_path, "ForMaskedLM", strict=False, **overrides)
    info = loaded.info
    named = [*info.missing_keys, *info.unexpected_keys, *(name for name, _, _ in info.mismatched_keys)]
    assert named
    assert all(name in str(caught[0].message) for name in named)
    assert {parameter.name for parameter, _ in loaded.tensors()} == set(loaded.parameters) - set(named)


def test_mismatched_sizes(tmp_path):
    write(tmp_path, "ForTokenClassification")
    with pytest.raises(LoadError, match="ignore_mismatched_sizes=True"):
        prepare(tmp_path, "ForTokenClassification", num_labels=5)
    with pytest.warns(UserWarning, match=r"newly initialised: classifier.weight \(\(2, 8\) -> \(5, 8\)\)"):
        loaded = prepare(tmp_path, "ForTokenClassification", num_labels=5, ignore_mismatched_sizes=True)
    assert loaded.info.to_dict() == {
        "missing_keys": [],
        "unexpected_keys": [],
        "mismatched_keys": [("classifier.weight", (2, 8), (5, 8)), ("classifier.bias", (2,), (5,))],
    }
    assert loaded.config.num_labels == 5


@pytest.mark.parametrize("allowed", [{}, {"strict": False}, {"ignore_mismatched_sizes": True}])
def test_nothing_matches(tmp_path, allowed):
    write(tmp_path, "ForMaskedLM")
    other = {"hidden_size": 4, "num_hidden_layers": 0}
    with pytest.raises(LoadError, match="no tensor of the base model matches"):
        prepare(tmp_path, "ForMaskedLM", **other, **allowed)


# ------------------------------------------------------------------ config


def test_config_given_beside_or_missing(tmp_path):
    write(tmp_path, "Model")
    assert prepare(tmp_path, "Model", layer_norm_eps=1e-3).config.layer_norm_eps == 1e-3
    assert prepare(tmp_path, "Model", config=CONFIG.replace(layer_norm_eps=1e-2)).config.layer_norm_eps == 1e-2
    (tmp_path / "config.json").unlink()
    told = r"no config.json beside .*give config=.*hidden_size=8.*num_hidden_layers=2.*do not tell num_attention_heads"
    with pytest.raises(checkpoint.CheckpointError, match=told):
        prepare(tmp_path / "model.safetensors", "Model")
    assert prepare(tmp_path / "model.safetensors", "Model", config=CONFIG).config.hidden_size == 8


def test_configs_are_not_changed(tmp_path):
    config = tiny_config(hidden_size=8, intermediate_size=12)
    prepare(write(tmp_path, "Model"), "Model", config=config, dtype="float16", layer_norm_eps=1e-3)
    assert config == CONFIG


def test_opened_checkpoint(tmp_path):
    opened = checkpoint.open(write(tmp_path, "ForMaskedLM"))
    assert prepare(opened, "ForMaskedLM").checkpoint is opened


def test_override_ties_the_decoder(tmp_path):
    write(tmp_path, "ForMaskedLM", CONFIG.replace(tie_word_embeddings=False))
    loaded = prepare(tmp_path, "ForMaskedLM", tie_word_embeddings=True)
    assert loaded.info == loading.LoadingInfo()
    assert loaded.checkpoint.dropped == ("lm_head.decoder.weight",)
    with pytest.warns(UserWarning, match="twice with different values"):
        list(loaded.tensors())


def test_unknown_arguments(tmp_path):
    write(tmp_path, "Model")
    with pytest.raises(TypeError, match="hiden_size, strct: neither an option of the hub nor a field"):
        prepare(tmp_path, "Model", hiden_size=3, strct=False)
    with pytest.raises(ValueError, match="unknown head 'ForTea'"):
        prepare(tmp_path, "ForTea")
    with pytest.raises(FileNotFoundError, match="no file or directory"):
        prepare(tmp_path / "nowhere", "Model")


# ------------------------------------------------------------------ dtype


@pytest.mark.parametrize("stored", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_dtype_of_the_parameters(tmp_path, stored):
    write(tmp_path, "Model", dtype=stored)
    own = np.dtype(stored).name
    for asked, expected in [(None, "float32"), ("auto", own), *((name, name) for name in DTYPES)]:
        loaded = prepare(tmp_path, "Model", dtype=asked)
        assert (loaded.dtype, loaded.config.dtype) == (expected, expected)
        assert {array.dtype.name for _, array in loaded.tensors()} == {expected}


def test_auto_without_config_dtype(tmp_path):
    write(tmp_path, "Model", dtype=np.float16)
    assert prepare(tmp_path, "Model", dtype="auto", config=CONFIG).dtype == "float16"


class FromTensorFlow:
    name = "bfloat16"


class FromPyTorch:
    def __str__(self):
        return "torch.bfloat16"

    __repr__ = __str__


BRAIN = ["bfloat16", ml_dtypes.bfloat16, np.dtype(ml_dtypes.bfloat16), FromTensorFlow(), FromPyTorch()]


@pytest.mark.parametrize("dtype", BRAIN)
def test_framework_dtypes(dtype):
    assert loading.dtype_name(dtype) == "bfloat16"


@pytest.mark.parametrize("dtype", ["int64", "float8_e4m3fn", float, 16, np.int32, "torch", True])
def test_other_dtypes(tmp_path, dtype):
    with pytest.raises(ValueError, match="dtype must be one of float64, float32, bfloat16, float16"):
        loading.dtype_name(dtype)
