"""fairseq's files: every layout, every spelling, both directions, and what is refused."""

import argparse
import json
import shutil
import zipfile
from itertools import product

import ml_dtypes
import numpy as np
import pytest

from roberta_pln import checkpoint, loading, schema
from roberta_pln.checkpoint import CheckpointError, fairseq, fairseq_dictionary, torch_pickle
from roberta_pln.checkpoint.stored import Stored
from roberta_pln.checkpoint.torch_pickle import Entry
from tests.contract import DATA, random_tensors, tiny_config

GENUINE = {name: DATA / "fairseq" / name / "checkpoint.pt" for name in ("mlm", "classification", "hydra")}
TYPES = f"{schema.PREFIX}.embeddings.token_type_embeddings.weight"
CONFIG = tiny_config(
    vocab_size=11,
    hidden_size=4,
    num_attention_heads=2,
    intermediate_size=6,
    max_position_embeddings=10,
    type_vocab_size=1,
    hidden_dropout_prob=0.2,
    attention_probs_dropout_prob=0.3,
    classifier_dropout=0.4,
)
UNTIED = CONFIG.replace(tie_word_embeddings=False)
CLASSES = CONFIG.replace(id2label={0: "no", 1: "well, yes", 2: "é"})
SCORE = CONFIG.replace(num_labels=1, problem_type="regression", hidden_act="gelu_new")
MODELS = {
    "tied": (CONFIG, "ForMaskedLM"),
    "untied": (UNTIED, "ForMaskedLM"),
    "classes": (CLASSES, "ForSequenceClassification"),
    "score": (SCORE, "ForSequenceClassification"),
}
DTYPES = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

SETTINGS = dict(
    _name="roberta_base",
    encoder_layers=2,
    encoder_embed_dim=4,
    encoder_ffn_embed_dim=6,
    encoder_attention_heads=2,
    max_positions=8,
    encoder_normalize_before=True,
    dropout=0.2,
    attention_dropout=0.3,
    pooler_dropout=0.4,
)
"""Of `CONFIG`."""

SPELLED = [
    ("roberta_prelayernorm.embeddings.word_embeddings", "encoder.sentence_encoder.embed_tokens"),
    ("roberta_prelayernorm.embeddings.position_embeddings", "encoder.sentence_encoder.embed_positions"),
    ("roberta_prelayernorm.embeddings.LayerNorm", "encoder.sentence_encoder.layernorm_embedding"),
    ("roberta_prelayernorm.encoder.layer.", "encoder.sentence_encoder.layers."),
    ("roberta_prelayernorm.LayerNorm", "encoder.sentence_encoder.layer_norm"),
    ("attention.LayerNorm", "self_attn_layer_norm"),
    ("attention.self.query", "self_attn.q_proj"),
    ("attention.self.key", "self_attn.k_proj"),
    ("attention.self.value", "self_attn.v_proj"),
    ("attention.output.dense", "self_attn.out_proj"),
    ("intermediate.LayerNorm", "final_layer_norm"),
    ("intermediate.dense", "fc1"),
    ("output.dense", "fc2"),
    ("lm_head.decoder.weight", "lm_head.weight"),
    ("lm_head.", "encoder.lm_head."),
    ("classifier.", "classification_heads.sentence_classification_head."),
]
"""Written out by hand, in the order in which they are replaced."""


@pytest.fixture(autouse=True)
def memory_only(monkeypatch):
    """Flushing files to disk takes most of the time, and changes none of them."""
    monkeypatch.setattr("os.fsync", lambda _: None)


def weights(config=CONFIG, head="ForMaskedLM", dtype=np.float32):
    tensors = {name: array.astype(dtype) for name, array in random_tensors(config, head).items()}
    tensors[TYPES][:] = 0
    return tensors


def spelled(tensors):
    """Canonical names to those of fairseq, by the list above."""
    found = {}
    for name, array in tensors.items():
        for ours, theirs in SPELLED:
            name = name.replace(ours, theirs)
        if name != TYPES:
            found[name] = array
    return found


def state_of(model, settings=SETTINGS, **others):
    """What fairseq-hydra-train would write."""
    keys = {id(array): str(index) for index, array in enumerate(model.values())}  # tied ones are one array
    entries = {
        name: Entry(keys[id(array)], Stored(array.shape, array.dtype, lambda array=array: array))
        for name, array in model.items()
    }
    return {"args": None, "cfg": {"model": settings}, "model": entries, **others}


def write(path, model, settings=SETTINGS, **others):
    torch_pickle.write_object(path, state_of(model, settings, **others))
    return path


def assert_equal(ours, theirs):
    assert set(ours) == set(theirs)
    for name, array in theirs.items():
        assert ours[name].dtype == array.dtype == ours.dtype(name)
        assert ours[name].shape == array.shape == ours.shape(name)
        assert ours[name].tobytes() == array.tobytes()


# ------------------------------------------------------------------ there and back


@pytest.mark.parametrize(("model", "dtype"), list(product(MODELS, DTYPES)))
def test_there_and_back(tmp_path, model, dtype):
    config, head = MODELS[model]
    tensors = weights(config, head, DTYPES[dtype])
    path = checkpoint.save(tensors, tmp_path, config, head, "fairseq")
    assert path == tmp_path / "model.pt"
    opened = checkpoint.open(tmp_path)
    assert_equal(opened, tensors)
    assert (opened.format, opened.head, opened.foreign) == ("fairseq", head, ())
    assert opened.config == config.replace(dtype=dtype, architectures=[schema.architecture(head)])

    (tmp_path / "config.json").unlink()  # then the settings say the same, but for the names of the classes
    opened = checkpoint.open(path)
    assert_equal(opened, tensors)
    labels = {"id2label": opened.config.id2label} if model == "classes" else {}
    assert opened.config == config.replace(dtype=dtype, architectures=[schema.architecture(head)], **labels)
    assert opened.config.num_labels == config.num_labels


@pytest.mark.parametrize("model", MODELS)
def test_names_are_those_written_out_by_hand(tmp_path, model):
    config, head = MODELS[model]
    tensors = weights(config, head)
    path = checkpoint.save(tensors, tmp_path, config, head, "fairseq")
    stored = fairseq.read(path).tensors
    for name, array in spelled(tensors).items():
        assert np.array_equal(stored[name].read(), array)
    (tmp_path / "config.json").unlink()
    assert_equal(
        checkpoint.open(write(tmp_path / "again.pt", spelled(tensors), SETTINGS | settings_of(config))), tensors
    )


def settings_of(config):
    return {
        "untie_weights_roberta": not config.tie_word_embeddings,
        "activation_fn": "gelu" if config.hidden_act == "gelu" else "gelu_accurate",
    }


@pytest.mark.parametrize("count", [1, 3])
def test_any_number_of_token_types_that_are_zero(tmp_path, count):
    config = CONFIG.replace(type_vocab_size=count)
    tensors = weights(config)
    checkpoint.save(tensors, tmp_path, config, "ForMaskedLM", "fairseq")
    assert_equal(checkpoint.open(tmp_path), tensors)
    assert checkpoint.open(tmp_path, CONFIG.replace(type_vocab_size=2)).shape(TYPES) == (2, 4)


# ------------------------------------------------------------------ layouts


def layout(name, model, torch):
    """What is in a file of one of the ways to write them."""
    tensors = {key: torch.from_numpy(array) for key, array in model.items()}
    namespace = argparse.Namespace(arch="roberta_base", **SETTINGS)
    state = {
        "args": {"args": namespace},
        "args and cfg": {"args": namespace, "cfg": {"model": {}}},
        "train": {"args": None, "cfg": {"model": namespace, "task": argparse.Namespace(data="x")}},
        "hydra": {"args": None, "cfg": {"_name": None, "model": dict(SETTINGS), "task": {"_name": "masked_lm"}}},
        "deepspeed": {"args": None, "cfg": {"model": argparse.Namespace(**SETTINGS | {"_name": "deepspeed_roberta"})}},
    }[name]
    version = {"encoder.sentence_encoder.version": torch.tensor([3.0])}
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.ones(1000)}}, "param_groups": [{"betas": (0.9, 0.98)}]}
    return {**state, "model": {**tensors, **version}, "extra_state": {}, "last_optimizer_state": optimizer}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["args", "args and cfg", "train", "hydra", "deepspeed"])
def test_layouts(tmp_path, name, zipped):
    torch = pytest.importorskip("torch")
    tensors = weights()
    torch.save(layout(name, spelled(tensors), torch), tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    opened = checkpoint.open(tmp_path / "x.pt")
    assert_equal(opened, tensors)
    assert opened.format == "fairseq"
    assert opened.config == CONFIG.replace(dtype="float32", architectures=["RobertaPreLayerNormForMaskedLM"])
    assert opened.dropped == ("last_optimizer_state", "encoder.sentence_encoder.version")


def test_the_optimizer_s_state_is_not_read(tmp_path):
    """Its bytes need not even be there."""
    with zipfile.ZipFile(GENUINE["hydra"]) as source, zipfile.ZipFile(tmp_path / "x.pt", "w") as target:
        state, _ = torch_pickle.load(GENUINE["hydra"])
        kept = {f"data/{tensor.storage.key}" for tensor in state["model"].values()} | {"data.pkl", "version"}
        for name in source.namelist():
            if name.partition("/")[2] in kept:
                target.writestr(name, source.read(name))
        assert len(target.namelist()) < len(source.namelist()) / 2
    ours, theirs = checkpoint.open(tmp_path / "x.pt"), checkpoint.open(GENUINE["hydra"])
    assert_equal(ours, theirs)
    assert "last_optimizer_state" in ours.dropped


@pytest.mark.parametrize("name", ["roberta_large", "deepspeed_roberta_large"])
def test_what_a_file_leaves_out_its_architecture_says(tmp_path, name):
    """One that is not fairseq's own may leave out no size."""
    few = {name: SETTINGS[name] for name in ("max_positions", "encoder_normalize_before")}
    path = write(tmp_path / "x.pt", spelled(weights()), {"_name": name, **few})
    large = fairseq.read(path).config  # its tensors are smaller
    assert (large.num_hidden_layers, large.hidden_size, large.num_attention_heads) == (24, 1024, 16)
    assert (large.hidden_dropout_prob, large.classifier_dropout, large.hidden_act) == (0.1, 0.0, "gelu")
    path = write(tmp_path / "y.pt", spelled(weights()), {"_name": "mine", **few})
    with pytest.raises(
        CheckpointError, match=r"no encoder_layers, .*, which architecture 'mine' is not known to imply"
    ):
        checkpoint.open(path)


@pytest.mark.parametrize(
    ("settings", "field", "value"),
    [
        ({"activation_fn": "gelu_accurate"}, "hidden_act", "gelu_new"),
        ({"activation_fn": "gelu_fast"}, "hidden_act", "gelu_new"),
        ({"activation_fn": "relu"}, "hidden_act", "relu"),
        ({"activation_fn": "relu_squared"}, "hidden_act", "relu2"),
        ({"dropout": None}, "hidden_dropout_prob", 0.1),
        ({"regression_target": True}, "problem_type", "regression"),
        ({"untie_weights_roberta": True}, "tie_word_embeddings", False),
    ],
)
def test_settings(tmp_path, settings, field, value):
    tensors = spelled(weights(CONFIG, "ForSequenceClassification"))
    opened = checkpoint.open(write(tmp_path / "x.pt", tensors, SETTINGS | settings))
    assert getattr(opened.config, field) == value


def test_a_setting_without_counterpart_is_told(tmp_path):
    path = write(
        tmp_path / "x.pt", spelled(weights()), SETTINGS | {"activation_dropout": 0.1, "encoder_layerdrop": 0.2}
    )
    with pytest.warns(UserWarning, match=r"activation_dropout=0.1, encoder_layerdrop=0.2 of fairseq's training"):
        checkpoint.open(path)


# ------------------------------------------------------------------ spellings


def joined(model, stacked):
    """The model with each layer's query, key and value in one tensor, named by a function of the layer and leaf."""
    model = dict(model)
    for layer, leaf in product(range(2), ("weight", "bias")):
        start = f"encoder.sentence_encoder.layers.{layer}."
        parts = [model.pop(f"{start}self_attn.{part}_proj.{leaf}") for part in "qkv"]
        model[start + stacked(leaf)] = np.concatenate(parts)
    return model


def replaced(model, *pairs):
    for old, new in pairs:
        assert any(old in name for name in model)
        model = {name.replace(old, new): array for name, array in model.items()}
    return model


def deepspeed(model):
    model = joined(model, lambda leaf: f"attn_qkv{leaf[0]}")
    renamed = [
        ("self_attn.out_proj.", "attn_o"),
        ("self_attn_layer_norm.", "norm_"),
        ("final_layer_norm.", "attn_n"),
        ("fc1.", "inter_"),
        ("fc2.", "output_"),
    ]
    return replaced(
        model, *((f"{old}{leaf}", f"{new}{leaf[0]}") for old, new in renamed for leaf in ("weight", "bias"))
    )


OLD = {
    "decoder": lambda model: replaced(model, ("encoder.sentence", "decoder.sentence"), ("encoder.lm", "decoder.lm")),
    "emb_layer_norm": lambda model: replaced(model, (".layernorm_embedding.", ".emb_layer_norm.")),
    "layer_norms": lambda model: replaced(
        model, ("self_attn_layer_norm", "layer_norms.0"), ("final_layer_norm", "layer_norms.1")
    ),
    "in_proj": lambda model: joined(model, lambda leaf: f"self_attn.in_proj_{leaf}"),
    "deepspeed": deepspeed,
}


@pytest.mark.parametrize("spelling", OLD)
def test_old_spellings(tmp_path, spelling):
    tensors = weights()
    opened = checkpoint.open(write(tmp_path / "x.pt", OLD[spelling](spelled(tensors))))
    assert_equal(opened, tensors)
    assert opened.foreign == ()


def test_parts_of_a_tensor_are_read_alone(tmp_path):
    path = write(tmp_path / "x.pt", deepspeed(spelled(weights())))
    stored = fairseq.read(path).tensors
    parts = [stored[f"encoder.sentence_encoder.layers.0.self_attn.{part}_proj.weight"] for part in "qkv"]
    assert len({part.identity[0] for part in parts}) == 1  # one storage
    assert [part.identity[1] for part in parts] == [0, 16, 32]
    assert [part.map().nbytes for part in parts] == [64, 64, 64]


def test_stale_copies_are_left_out():
    opened = checkpoint.open(GENUINE["hydra"])
    stale = [name for name in opened.dropped if ".layers." in name]
    assert len(stale) == 2 * 8
    assert opened.foreign == ()


# ------------------------------------------------------------------ heads


def two_classifiers(tmp_path):
    model = spelled(weights(CONFIG, "ForSequenceClassification"))
    name, first = "classification_heads.sentence_classification_head", "classification_heads.mnli"
    other = {key.replace(name, first): array[:1] if "out_proj" in key else array for key, array in model.items()}
    return write(tmp_path / "x.pt", model | {key: array for key, array in other.items() if first in key})


def test_several_classifiers(tmp_path):
    path = two_classifiers(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"sentence_classification_head, mnli: choose .*classification_head='sent"
    ):
        checkpoint.open(path)
    with pytest.raises(CheckpointError, match=r"no classification head 'rte', but sentence_classification_head, mnli"):
        checkpoint.open(path, classification_head="rte")
    opened = checkpoint.open(path, classification_head="mnli")
    assert opened.config.num_labels == 1
    assert opened.shape("classifier.out_proj.weight") == (1, 4)
    assert "classification_heads.sentence_classification_head.dense.bias" in opened.dropped
    assert checkpoint.open(path, classification_head="sentence_classification_head").config.num_labels == 2
    changed = loading.prepare(opened, "ForSequenceClassification", hidden_dropout_prob=0.5)
    assert changed.checkpoint.classification_head == "mnli"
    assert changed.info.missing_keys == ()


def test_only_fairseq_has_classifiers_by_name(tmp_path):
    checkpoint.save(weights(), tmp_path, CONFIG, "ForMaskedLM")
    with pytest.raises(CheckpointError, match=r"classification_head is for files of fairseq, and .* 'safetensors'"):
        checkpoint.open(tmp_path, classification_head="mnli")


def test_a_trained_classifier_wins_and_the_language_model_stays(tmp_path):
    opened = checkpoint.open(GENUINE["classification"])
    assert opened.head == "ForSequenceClassification"
    assert opened.config.id2label == {0: "neg", 1: "pos", 2: "neu"}
    for head in ("ForSequenceClassification", "ForMaskedLM"):
        assert loading.prepare(opened, head).info.missing_keys == ()
    with pytest.warns(UserWarning, match=r"also holds lm_head, .*; head= chooses another"):
        checkpoint.convert(opened, tmp_path / "a")
    checkpoint.convert(opened, tmp_path / "b", head="ForMaskedLM")
    a, b = checkpoint.open(tmp_path / "a"), checkpoint.open(tmp_path / "b")
    assert set(a) | set(b) == set(opened)
    assert (a.head, b.head) == ("ForSequenceClassification", "ForMaskedLM")


def test_a_file_without_heads_is_a_base_model(tmp_path):
    opened = checkpoint.open(write(tmp_path / "x.pt", spelled(weights(CONFIG, "Model"))))
    assert opened.head == "Model"


def test_a_language_model_head_of_zeros_is_none(tmp_path):
    tensors = weights(CLASSES, "ForSequenceClassification")
    path = checkpoint.save(tensors, tmp_path, CLASSES, "ForSequenceClassification", "fairseq")
    state, places = torch_pickle.load(path)
    stored = torch_pickle.stored(path, state["model"], places)
    head = [name for name in stored if name.startswith("encoder.lm_head.")]
    assert len(head) == 6
    assert not any(np.any(stored[name].read()) for name in head if name != "encoder.lm_head.weight")
    assert "encoder.lm_head.bias" in checkpoint.open(path).dropped


def test_a_head_that_has_another_activation_is_left_out_beside_a_classifier(tmp_path):
    model = spelled(weights(CONFIG, "ForSequenceClassification") | weights())
    opened = checkpoint.open(write(tmp_path / "x.pt", model, SETTINGS | {"activation_fn": "relu"}))
    assert opened.head == "ForSequenceClassification"
    assert not any(name.startswith("lm_head") for name in opened)
    assert "encoder.lm_head.bias" in opened.dropped


# ------------------------------------------------------------------ refused


REFUSED = {
    "post-LN": ({"encoder_normalize_before": False}, "encoder_normalize_before is False: .* post-LN"),
    "no norm": ({"layernorm_embedding": False}, "layernorm_embedding is False: nothing normalises its embeddings"),
    "architecture": ({"_name": "roberta_prenorm"}, "layernorm_embedding is False"),
    "default": ({"encoder_normalize_before": None}, "encoder_normalize_before is False"),
    "scale": ({"no_scale_embedding": False}, "no_scale_embedding is False"),
    "sinusoids": ({"encoder_learned_pos": False}, "sinusoids"),
    "no positions": ({"no_token_positional_embeddings": True}, "has no positions"),
    "fewer layers": ({"encoder_layers_to_keep": "0,1"}, "leaves out some layers"),
    "noise": ({"quant_noise_pq": 0.1}, "further projection"),
    "quantised": ({"quant_noise_scalar": 0.1}, "rounds its weights"),
    "activation": ({"activation_fn": "swish"}, "activation_fn is 'swish', not one of gelu, "),
    "activation of the head": ({"activation_fn": "relu"}, "'relu': its language-model head has it too"),
    "length": ({"max_positions": 9}, "10 rows, which makes max_positions 8, but its settings have 9"),
    "sizes": ({"encoder_layers": 2.5}, "settings describe no model: .*num_hidden_layers must be an integer"),
    "no number": ({"encoder_layers": [2] * 99}, "encoder_layers is a list, no number"),
    "no name": ({"activation_fn": ["gelu"]}, "activation_fn is a list, not one of gelu, "),
    "all at once": ({"encoder_learned_pos": False, "quant_noise_pq": 1}, "encoder_learned_pos(.|\n)*quant_noise_pq"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_of_other_models_are_refused(tmp_path, name):
    settings, message = REFUSED[name]
    path = write(tmp_path / "x.pt", spelled(weights()), SETTINGS | settings)
    with pytest.raises(CheckpointError, match=rf"x\.pt: (.|\n)*{message}"):
        checkpoint.open(path)


def test_a_config_beside_the_file_does_not_make_it_another_model(tmp_path):
    checkpoint.save(weights(), tmp_path, CONFIG, "ForMaskedLM", "fairseq")
    path = write(tmp_path / "x.pt", spelled(weights()), SETTINGS | {"encoder_normalize_before": False})
    with pytest.raises(CheckpointError, match="post-LN"):
        checkpoint.open(path)


def test_classifiers_with_another_activation_are_refused(tmp_path):
    model = spelled(weights(CONFIG, "ForSequenceClassification"))
    with pytest.raises(CheckpointError, match="pooler_activation_fn is 'relu': its classifier needs tanh"):
        checkpoint.open(write(tmp_path / "x.pt", model, SETTINGS | {"pooler_activation_fn": "relu"}))


def broken(model):
    words, stacked = "encoder.sentence_encoder.embed_tokens.weight", "encoder.sentence_encoder.layers.0.attn_qkvw"
    return {
        "no words": ({name: array for name, array in model.items() if name != words}, "lacks .*embed_tokens"),
        "twice": (model | {stacked: np.ones((12, 4), np.float32)}, "q_proj.weight twice, once as '.*attn_qkvw'"),
        "parts": (OLD["in_proj"](model) | {stacked: np.ones((13, 4), np.float32)}, r"\(13, 4\) has no 3 equal parts"),
        "integers": (model | {words: np.ones((11, 4), np.int64)}, "parameters are of float64"),
    }


@pytest.mark.parametrize("name", ["no words", "twice", "parts", "integers"])
def test_broken_files(tmp_path, name):
    model, message = broken(spelled(weights()))[name]
    with pytest.raises(CheckpointError, match=message):
        checkpoint.open(write(tmp_path / "x.pt", model))


def test_missing_tensors_are_named(tmp_path):
    model = spelled(weights())
    del model["encoder.sentence_encoder.layer_norm.weight"]
    path = write(tmp_path / "x.pt", model | {"encoder.step": np.ones(1, np.float32)})
    with pytest.raises(
        CheckpointError, match=r"missing: roberta_prelayernorm.LayerNorm.weight\n *unexpected: encoder.st"
    ):
        loading.prepare(path, "ForMaskedLM")


NOT_HELD = {
    "base": ({}, "Model", "Model: its RoBERTa has the heads"),
    "causal": ({}, "ForCausalLM", "ForCausalLM: its RoBERTa has"),
    "tokens": ({}, "ForTokenClassification", "ForTokenClassification: its"),
    "decoder": ({"is_decoder": True}, "ForMaskedLM", "is_decoder: its RoBERTa sees both sides"),
    "cross": ({"is_decoder": True, "add_cross_attention": True}, "ForMaskedLM", "add_cross_attention: "),
    "relative": (
        {"position_embedding_type": "relative_key"},
        "ForMaskedLM",
        "'relative_key': its positions are absolute",
    ),
    "pruned": ({"pruned_heads": {0: [1]}}, "ForMaskedLM", "pruned_heads: "),
    "epsilon": ({"layer_norm_eps": 1e-12}, "ForMaskedLM", "layer_norm_eps=1e-12: its norms have 1e-05"),
    "pad": ({"pad_token_id": 0}, "ForMaskedLM", "pad_token_id=0: its dictionaries have 1"),
    "activation": ({"hidden_act": "mish"}, "ForSequenceClassification", "hidden_act='mish': its activations are"),
    "learned activation": ({"hidden_act": "xielu"}, "ForMaskedLM", "hidden_act='xielu'"),
    "activation of the head": (
        {"hidden_act": "relu"},
        "ForMaskedLM",
        "'relu': its language-model head has the layers'",
    ),
}


@pytest.mark.parametrize("name", NOT_HELD)
def test_what_fairseq_cannot_hold_is_refused(tmp_path, name):
    changes, head, message = NOT_HELD[name]
    config = CONFIG.replace(**changes)
    with pytest.raises(CheckpointError, match=rf"fairseq cannot hold this model:(.|\n)*{message}"):
        checkpoint.save(weights(config, head), tmp_path / "new", config, head, "fairseq")
    assert not (tmp_path / "new").exists()


def test_token_types_that_make_a_difference_are_refused(tmp_path):
    tensors = weights()
    tensors[TYPES][0, 2] = 1e-6
    with pytest.raises(CheckpointError, match="token_type_embeddings.weight is not zero, and it has no token types"):
        checkpoint.save(tensors, tmp_path, CONFIG, "ForMaskedLM", "fairseq")
    assert not any(tmp_path.iterdir())


# ------------------------------------------------------------------ what is written


def form(value):
    """The shape of a value: keys and types."""
    if isinstance(value, dict):
        return {key: form(item) for key, item in value.items()}
    return type(value).__name__


def test_what_is_written_is_of_the_genuine_form(tmp_path):
    torch = pytest.importorskip("torch")
    config = checkpoint.open(GENUINE["mlm"]).config
    checkpoint.convert(GENUINE["mlm"], tmp_path, "fairseq")
    ours = torch.load(tmp_path / "model.pt", weights_only=True)
    with torch.serialization.safe_globals([argparse.Namespace]):
        theirs = torch.load(GENUINE["mlm"], weights_only=True)
    assert list(ours) == list(theirs)
    assert type(ours["model"]) is type(theirs["model"])
    assert form(ours["model"]) == form(theirs["model"])
    for name, tensor in theirs["model"].items():
        assert torch.equal(ours["model"][name], tensor)
        assert ours["model"][name].dtype == tensor.dtype
    pointers = [
        ours["model"][f"encoder.{name}.weight"].data_ptr() for name in ("lm_head", "sentence_encoder.embed_tokens")
    ]
    assert pointers[0] == pointers[1]
    for topic in ("model", "task", "criterion", "common"):
        known = theirs["cfg"][topic] if topic != "model" else vars(theirs["cfg"]["model"])
        told = {name: value for name, value in ours["cfg"][topic].items() if name not in ("_name", "data")}
        assert {name: known[name] for name in told if name != "tokens_per_sample"} == {
            name: value for name, value in told.items() if name != "tokens_per_sample"
        }
    assert ours["optimizer_history"][-1].keys() == theirs["optimizer_history"][-1].keys()
    assert ours["extra_state"]["train_iterator"].keys() == theirs["extra_state"]["train_iterator"].keys()
    assert config.num_attention_heads == ours["cfg"]["model"]["encoder_attention_heads"]


def test_the_class_task_is_written_as_fairseq_s(tmp_path):
    torch = pytest.importorskip("torch")
    checkpoint.convert(GENUINE["classification"], tmp_path, "fairseq", head="ForSequenceClassification")
    ours = torch.load(tmp_path / "model.pt", weights_only=True)
    with torch.serialization.safe_globals([argparse.Namespace]):
        theirs = torch.load(GENUINE["classification"], weights_only=True)
    assert form(ours["model"]) == form(theirs["model"])
    for topic in ("task", "criterion"):
        told = {name: value for name, value in ours["cfg"][topic].items() if name != "data"}
        assert told == {name: theirs["cfg"][topic][name] for name in told}


# ------------------------------------------------------------------ files beside others


def test_content_tells_the_formats_apart(tmp_path):
    path = checkpoint.save(weights(), tmp_path / "plain", CONFIG, "ForMaskedLM", "torch")
    plain = path.rename(path.with_name("x.pt"))
    assert checkpoint.open(plain).format == "torch"
    assert checkpoint.open(GENUINE["mlm"]).format == "fairseq"
    with pytest.raises(CheckpointError, match="'args' is a NoneType"):
        checkpoint.open(GENUINE["mlm"], format="torch")
    alone = plain.rename(plain.with_name("model.pt"))
    assert checkpoint.open(alone).format == "torch"
    with pytest.raises(CheckpointError, match="a state dict alone is of format 'torch'"):
        checkpoint.open(alone.parent)


@pytest.mark.filterwarnings("error")
def test_other_formats_leave_model_pt_alone(tmp_path):
    """It is a common name, and a file of fairseq's may be all there is of a training."""
    (tmp_path / "model.pt").write_text("anything")
    checkpoint.save(weights(), tmp_path, CONFIG, "ForMaskedLM")
    assert (tmp_path / "model.pt").read_text() == "anything"
    assert checkpoint.open(tmp_path).format == "safetensors"
    shutil.copy(GENUINE["hydra"], tmp_path / "model.pt")
    with pytest.warns(UserWarning, match="holds model.safetensors, which is used, and also model.pt"):
        checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds a checkpoint already \(model.pt, model.safetensors\)"):
        checkpoint.convert(GENUINE["hydra"], tmp_path, "fairseq")
    checkpoint.save(weights(), tmp_path, CONFIG, "ForMaskedLM", "fairseq")
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("name", fairseq_dictionary.LABELS)
def test_names_of_the_classes(tmp_path, name):
    path = write(tmp_path / "x.pt", spelled(weights(CLASSES, "ForSequenceClassification")))
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("no 27\nwell, yes 18\né 3\nmadeupword0000 0\n", encoding="utf-8")
    assert checkpoint.open(path).config.id2label == CLASSES.id2label
    for text in ("no 27\nyes 18\n", "no 1\nno 1\nyes 1\n", "no\nyes\nperhaps\n", "\n\n\n"):
        (tmp_path / name).write_text(text)
        with pytest.raises(CheckpointError, match=r"dict.txt must name the 3 classes"):
            checkpoint.open(path)
    (tmp_path / name).write_bytes(b"\xff 1\n")
    with pytest.raises(CheckpointError, match=r"is no dictionary"):
        checkpoint.open(path)


def tokenizer_beside(folder, size, **special):
    """A folder of a model with as much of a tokenizer as ids need."""
    tokens = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": size - 1, **special}
    added = [{"content": token, "id": index} for token, index in tokens.items()]
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 4}}, "added_tokens": added}))


def test_dictionaries_of_ids(tmp_path):
    checkpoint.save(weights(CLASSES, "ForSequenceClassification"), tmp_path / "a", CLASSES, "ForSequenceClassification")
    tokenizer_beside(tmp_path / "a", 11)
    checkpoint.convert(tmp_path / "a", tmp_path / "b", "fairseq")
    vocabulary = "4 0\n5 0\n6 0\n7 0\n8 0\n9 0\n"  # <mask>, which fairseq adds, is 10
    assert (tmp_path / "b" / "dict.txt").read_text() == vocabulary
    assert (tmp_path / "b" / "input0" / "dict.txt").read_text() == vocabulary
    assert (tmp_path / "b" / "label" / "dict.txt").read_text(encoding="utf-8") == "no 0\nwell, yes 0\né 0\n"
    (tmp_path / "b" / "config.json").unlink()
    assert checkpoint.open(tmp_path / "b").config.id2label == CLASSES.id2label


def test_a_mask_that_is_not_last_has_a_line(tmp_path):
    checkpoint.save(weights(), tmp_path / "a", CONFIG, "ForMaskedLM")
    tokenizer_beside(tmp_path / "a", 11, **{"<mask>": 5})
    checkpoint.convert(tmp_path / "a", tmp_path / "b", "fairseq")
    assert (tmp_path / "b" / "dict.txt").read_text() == "4 0\n<mask> 0\n6 0\n7 0\n8 0\n9 0\n10 0\n"
    assert not (tmp_path / "b" / "label").exists()


def test_a_dictionary_travels_and_replaces_none(tmp_path):
    checkpoint.save(weights(), tmp_path / "a", CONFIG, "ForMaskedLM")
    (tmp_path / "a" / "dict.txt").write_text("13 850314647\n")
    tokenizer_beside(tmp_path / "a", 11)
    checkpoint.convert(tmp_path / "a", tmp_path / "b", "fairseq")
    assert (tmp_path / "b" / "dict.txt").read_text() == "13 850314647\n"
    (tmp_path / "a" / "dict.txt").unlink()
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "dict.txt").write_text("of my data 3\n")
    checkpoint.convert(tmp_path / "a", tmp_path / "c", "fairseq")
    assert (tmp_path / "c" / "dict.txt").read_text() == "of my data 3\n"


@pytest.mark.parametrize("special", [{"<unk>": 5}, {"<mask>": 11}, {"<mask>": 3}])
def test_ids_that_fairseq_cannot_have(tmp_path, special):
    checkpoint.save(weights(), tmp_path / "a", CONFIG, "ForMaskedLM")
    tokenizer_beside(tmp_path / "a", 11, **special)
    with pytest.warns(UserWarning, match="dict.txt is not written: fairseq's ids of"):
        checkpoint.convert(tmp_path / "a", tmp_path / "b", "fairseq")
    assert not (tmp_path / "b" / "dict.txt").exists()
    assert_equal(checkpoint.open(tmp_path / "b"), weights())
