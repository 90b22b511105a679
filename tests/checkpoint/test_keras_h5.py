"""Keras 3's HDF5 layout, against what Keras itself saves and loads."""

import json
import zipfile
from itertools import product

import ml_dtypes
import numpy as np
import pytest

from roberta_pln import checkpoint, schema
from roberta_pln.checkpoint import CheckpointError, hdf5, keras_h5
from tests.contract import random_tensors, tiny_config

h5py = pytest.importorskip("h5py")

CONFIG = tiny_config(hidden_size=8, intermediate_size=12, num_hidden_layers=3)
DECODER = {"is_decoder": True, "add_cross_attention": True, "pruned_heads": {1: [0, 2]}}
CASES = {
    **{head: (head, {}) for head in schema.HEADS},
    **{f"{head}, untied": (head, {"tie_word_embeddings": False}) for head in schema.LM_HEADS},
    "without layers": ("ForQuestionAnswering", {"num_hidden_layers": 0}),
    "layers of two digits": ("ForMaskedLM", {"num_hidden_layers": 11}),
    "prelu": ("ForTokenClassification", {"hidden_act": "prelu"}),
    "xielu": ("ForMultipleChoice", {"hidden_act": "xielu"}),
    "decoder": ("ForCausalLM", {**DECODER, "position_embedding_type": "relative_key"}),
}
DTYPES = {"float64": "float64", "float16": "float16", "bfloat16": ml_dtypes.bfloat16}


def values(case, dtype="float32"):
    head, changes = CASES[case]
    config = CONFIG.replace(**changes)
    tensors = random_tensors(config, head)
    return head, config, {name: array.astype(DTYPES.get(dtype, dtype)) for name, array in tensors.items()}


@pytest.fixture(scope="module")
def backend():
    pytest.importorskip("keras")
    pytest.importorskip("tensorflow")
    from roberta_pln import tf

    return tf


def built(backend, head, config, dtype="float32"):
    return getattr(backend, schema.architecture(head))(config, dtype=dtype)


def filled(backend, head, config, tensors, dtype="float32"):
    model = built(backend, head, config, dtype)
    backend.weights.load(model, ((model.parameters_of_schema[name], array) for name, array in tensors.items()))
    return model


def assert_equal(ours, theirs):
    assert set(ours) == set(theirs)
    for name, array in theirs.items():
        assert ours[name].dtype == array.dtype
        assert ours[name].tobytes() == array.tobytes()


ALL = [*product(CASES, ["float32"]), *product(["ForMaskedLM", "Model"], DTYPES)]


@pytest.mark.parametrize(("case", "dtype"), ALL)
def test_reads_what_keras_saves(backend, tmp_path, case, dtype):
    head, config, tensors = values(case, dtype)
    filled(backend, head, config, tensors, dtype).save_weights(tmp_path / "any.weights.h5")
    config.save_pretrained(tmp_path)
    opened = checkpoint.open(tmp_path / "any.weights.h5")
    assert_equal(opened, tensors)
    assert (opened.format, opened.foreign, opened.dropped) == ("keras", (), ())


@pytest.mark.parametrize(("case", "dtype"), ALL)
def test_keras_loads_what_is_written(backend, tmp_path, case, dtype):
    head, config, tensors = values(case, dtype)
    path = checkpoint.save(tensors, tmp_path, config, head, "keras")
    model = built(backend, head, config, dtype)
    model.load_weights(path)
    assert_equal(backend.weights.dump(model), tensors)
    assert_equal(checkpoint.open(tmp_path), tensors)


def test_whole_models_of_keras(backend, tmp_path):
    config = CONFIG.replace(tie_word_embeddings=False, architectures=["Other"])
    tensors = random_tensors(config, "ForCausalLM")
    filled(backend, "ForCausalLM", config, tensors).save(tmp_path / "mine.keras")
    opened = checkpoint.open(tmp_path / "mine.keras")
    assert_equal(opened, tensors)
    assert (opened.format, opened.head, opened.config.tie_word_embeddings) == ("keras", "ForCausalLM", False)
    checkpoint.convert(tmp_path / "mine.keras", tmp_path / "converted")
    assert_equal(checkpoint.open(tmp_path / "converted"), tensors)


def test_without_a_pooler(backend, tmp_path):
    tensors = random_tensors(CONFIG, "Model", pooler=False)
    path = checkpoint.save(tensors, tmp_path, CONFIG, "Model", "keras")
    model = backend.RobertaPreLayerNormModel(CONFIG, add_pooling_layer=False)
    model.load_weights(path)
    assert_equal(backend.weights.dump(model), tensors)
    model.save(tmp_path / "x.keras")
    assert_equal(checkpoint.open(tmp_path / "x.keras"), tensors)


def test_the_state_of_training_is_left_out(backend, tmp_path):
    model = built(backend, "ForSequenceClassification", CONFIG)
    model.compile(optimizer="adam")
    model.optimizer.build(model.trainable_variables)
    model.save_weights(tmp_path / "x.weights.h5")
    opened = checkpoint.open(tmp_path / "x.weights.h5", CONFIG)
    assert (opened.dropped, opened.foreign) == (("optimizer/vars",), ())
    assert_equal(opened, backend.weights.dump(model))


# ------------------------------------------------------------------ without Keras


@pytest.fixture
def path(tmp_path):
    return checkpoint.save(random_tensors(CONFIG, "ForMaskedLM"), tmp_path, CONFIG, "ForMaskedLM", "keras")


WORDS = "layers/roberta_pre_layer_norm_model/embeddings/word_embeddings/vars/0"
LAYER = "layers/roberta_pre_layer_norm_model/encoder/layer"


def test_layout(path):
    with h5py.File(path) as file:
        assert list(file[LAYER]) == ["layer", "layer_1", "layer_2"]
        assert file[WORDS].shape == (99, 8)
        assert file[f"{LAYER}/layer_2/feed_forward_output/dense/vars/0"].shape == (12, 8)


def test_equal_tensors_give_equal_files(path, tmp_path):
    checkpoint.save(checkpoint.open(path), tmp_path / "again", CONFIG, "ForMaskedLM", "keras")
    assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_the_content_tells_the_layouts_apart(path, tmp_path):
    other = checkpoint.save(checkpoint.open(path), tmp_path / "other", CONFIG, "ForMaskedLM", "h5")
    keras_3, keras_2 = path.rename(tmp_path / "a.h5"), other.rename(tmp_path / "b.weights.h5")
    for file, format, wrong in ((keras_3, "keras", "h5"), (keras_2, "h5", "keras")):
        opened = checkpoint.open(file, CONFIG)
        assert opened.format == format
        assert_equal(opened, random_tensors(CONFIG, "ForMaskedLM"))
        with pytest.raises(CheckpointError, match=f"format '{format}'"):
            checkpoint.open(file, CONFIG, format=wrong)


def a_circle(file, folder):
    file[LAYER]["again"] = file["layers"]


def a_soft_link(file, folder):
    del file[WORDS]
    file[WORDS] = h5py.SoftLink("/layers/lm_head/vars/0")


def an_external_link(file, folder):
    del file[WORDS]
    file[WORDS] = h5py.ExternalLink("other.h5", "x")


def a_group_elsewhere(file, folder):
    del file["layers/lm_head"]
    file["layers/lm_head"] = h5py.ExternalLink("other.h5", "x")


def external_storage(file, folder):
    (folder / "secret").write_bytes(bytes(99 * 8 * 4))
    del file[WORDS]
    file.create_dataset(WORDS, (99, 8), np.float32, external=[(folder / "secret", 0, 99 * 8 * 4)])


def virtual(file, folder):
    layout = h5py.VirtualLayout((99, 8), np.float32)
    layout[:] = h5py.VirtualSource(folder / "other.h5", "x", (99, 8))
    del file[WORDS]
    file.create_virtual_dataset(WORDS, layout)


def compressed(file, folder):
    del file[WORDS]
    file.create_dataset(WORDS, data=np.zeros((99, 8), np.float32), compression="gzip")


def raw_bytes(file, folder):
    del file[WORDS]
    file[WORDS] = np.zeros((99, 8), "V2")


REFUSED = {
    a_circle: "several links lead to the group",
    a_soft_link: "soft or external link",
    an_external_link: "soft or external link",
    a_group_elsewhere: "soft or external link",
    external_storage: "in another file",
    virtual: "in another file",
    compressed: "compressed or incomplete",
    raw_bytes: "dataset of numbers",
}


@pytest.mark.parametrize("change", REFUSED)
def test_refused(path, change):
    with h5py.File(path, "r+") as file:
        change(file, path.parent)
    with pytest.raises(CheckpointError, match=REFUSED[change]):
        checkpoint.open(path)


def test_what_no_rule_knows_is_foreign(path):
    with h5py.File(path, "r+") as file:
        file["layers/mine/vars/0"] = np.zeros(3)
        file["layers/lm_head/vars/1"] = np.zeros(3)
    foreign = {"layers/lm_head/vars/0", "layers/lm_head/vars/1", "layers/mine/vars/0"}
    assert set(checkpoint.open(path).foreign) == foreign


def zip_of(members, path):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


CONFIGS = {
    "another model": ({"class_name": "Functional", "config": {"layers": []}}, "no model of this library"),
    "no object": ([1], "no model of this library"),
    "no name": ({"class_name": None, "config": {"config": {"hidden_size": 7}}}, "no model of this library"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_other_models_of_keras(path, tmp_path, case):
    content, text = CONFIGS[case]
    members = {hdf5.KERAS_WEIGHTS: path.read_bytes(), "config.json": json.dumps(content)}
    with pytest.raises(CheckpointError, match=text):
        checkpoint.open(zip_of(members, tmp_path / "x.keras"))


def test_zip_files_without_weights(tmp_path):
    with pytest.raises(CheckpointError, match="no model of Keras"):
        keras_h5.read(zip_of({"config.json": "{}"}, tmp_path / "x.keras"))
