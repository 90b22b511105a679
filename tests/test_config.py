import json

import pytest

from roberta_pln import ConfigError, RobertaPreLayerNormConfig

PUBLISHED = {
    "architectures": ["RobertaPreLayerNormForMaskedLM"],
    "attention_probs_dropout_prob": 0.1,
    "bos_token_id": 0,
    "classifier_dropout": None,
    "eos_token_id": 2,
    "gradient_checkpointing": False,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 514,
    "model_type": "roberta-prelayernorm",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "pad_token_id": 1,
    "position_embedding_type": "absolute",
    "torch_dtype": "float32",
    "transformers_version": "4.20.1",
    "type_vocab_size": 1,
    "use_cache": True,
    "vocab_size": 50265,
}


def test_defaults_are_those_of_transformers():
    theirs = pytest.importorskip("transformers").RobertaPreLayerNormConfig()
    ours = RobertaPreLayerNormConfig()
    for name, value in ours._values().items():
        assert getattr(theirs, name) == value, name
    assert set(ours.to_dict()) - {"dtype"} <= set(theirs.to_dict())


def test_positional_order_is_that_of_transformers():
    theirs = pytest.importorskip("transformers").RobertaPreLayerNormConfig
    values = [99, 32, 2, 4, 37, "relu", 0.2, 0.3, 40, 3, 0.1, 1e-6, 5, 6, 7, "relative_key", False, 0.4]
    ours = RobertaPreLayerNormConfig(*values)
    for name, value in theirs(*values).to_dict().items():
        if name in ours.to_dict() and name != "model_type":
            assert ours.to_dict()[name] == value, name


def test_unknown_keys_survive_a_round_trip(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(PUBLISHED))
    config = RobertaPreLayerNormConfig.from_pretrained(tmp_path)
    assert (config.hidden_size, config.dtype, config.gradient_checkpointing) == (1024, "float32", False)
    config.save_pretrained(tmp_path)
    again = json.loads(path.read_text())
    assert again == {**{k: v for k, v in PUBLISHED.items() if k != "torch_dtype"}, "dtype": "float32"}


def test_text_is_sorted_and_labels_have_string_keys():
    config = RobertaPreLayerNormConfig(num_labels=3, pruned_heads={1: [0, 2]}, zeta=1)
    text = config.to_json_string()
    values = json.loads(text)
    assert list(values) == sorted(values)
    assert text.endswith("}\n")
    assert values["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    assert RobertaPreLayerNormConfig.from_dict(values) == config


def test_transformers_reads_it_and_is_read(tmp_path):
    theirs = pytest.importorskip("transformers").RobertaPreLayerNormConfig
    ours = RobertaPreLayerNormConfig(id2label={0: "no", 1: "yes", 2: "maybe"}, is_decoder=True, layer_norm_eps=1e-5)
    ours.save_pretrained(tmp_path)
    read = theirs.from_pretrained(tmp_path)
    assert (read.num_labels, read.label2id["maybe"], read.is_decoder, read.layer_norm_eps) == (3, 2, True, 1e-5)
    read.save_pretrained(tmp_path)
    back = RobertaPreLayerNormConfig.from_pretrained(tmp_path)
    del back.extra["transformers_version"]
    assert back == ours


def test_num_labels():
    assert RobertaPreLayerNormConfig().num_labels == 2
    config = RobertaPreLayerNormConfig(num_labels=4)
    assert (config.num_labels, config.label2id["LABEL_3"]) == (4, 3)
    named = RobertaPreLayerNormConfig.from_dict({"id2label": {"0": "a", "1": "b", "2": "c"}})
    assert (named.num_labels, named.id2label[2]) == (3, "c")
    assert RobertaPreLayerNormConfig.from_dict(named.to_dict(), num_labels=5).num_labels == 5
    assert named.replace(id2label={0: "x", 1: "y"}).label2id == {"x": 0, "y": 1}
    assert named.replace(num_labels=5).label2id["LABEL_4"] == 4
    assert named.replace(num_labels=3).id2label == named.replace(hidden_act="relu").id2label


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 30}, r"hidden size \(30\) is not a multiple of the number of attention heads \(12\)"),
        ({"hidden_size": -768}, "hidden_size must be an integer of at least 1, got -768"),
        ({"vocab_size": 0}, "vocab_size must be an integer of at least 1, got 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers must be an integer of at least 0, got -1"),
        ({"num_attention_heads": 0}, "num_attention_heads must be"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers must be an integer"),
        ({"hidden_act": "gelut"}, "hidden_act must be one of gelu, .* got 'gelut'"),
        ({"position_embedding_type": "rotary"}, "position_embedding_type must be one of absolute, .* got 'rotary'"),
        ({"problem_type": "ranking"}, "problem_type must be one of"),
        ({"hidden_dropout_prob": 1.5}, r"hidden_dropout_prob must be a number in \[0, 1\], got 1.5"),
        ({"classifier_dropout": -0.1}, "classifier_dropout must be"),
        ({"add_cross_attention": True}, "should be used as a decoder model if cross attention is added"),
        ({"pad_token_id": None}, "pad_token_id must be an integer"),
        ({"pad_token_id": 60000}, "pad_token_id must be below vocab_size"),
        ({"max_position_embeddings": 2}, "max_position_embeddings must be at least pad_token_id"),
        ({"pruned_heads": {12: [0]}}, "pruned_heads names layer 12"),
        ({"pruned_heads": {0: [12]}}, "heads from 0 to 11"),
        ({"pruned_heads": {0: list(range(12))}}, "at least one must stay"),
        ({"pruned_heads": [[0]]}, "pruned_heads must map numbers of layers to lists"),
        ({"id2label": ["no", "yes"]}, "id2label must map whole numbers to names"),
        ({"id2label": {"first": "no"}}, "id2label must map whole numbers to names"),
        ({"label2id": None}, "label2id must map names to whole numbers"),
        ({"num_labels": 10**9}, "num_labels must be an integer from 0 to 1048576, got 1000000000"),
        ({"architectures": "RobertaPreLayerNormModel"}, "architectures must be a list of names"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps must be a number of at least 0, got nan"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false, got 'false'"),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        RobertaPreLayerNormConfig(**changes)


def test_all_problems_come_at_once():
    with pytest.raises(ConfigError, match=r"invalid config: vocab_size must be .*; hidden_act must be"):
        RobertaPreLayerNormConfig(vocab_size=-1, hidden_act="none")


def test_labels_that_disagree():
    with pytest.raises(ConfigError, match="num_labels is 3, but id2label has 2 names: give one of the two"):
        RobertaPreLayerNormConfig(num_labels=3, id2label={0: "no", 1: "yes"})
    assert RobertaPreLayerNormConfig(num_labels=2, id2label={0: "no", 1: "yes"}).label2id == {"no": 0, "yes": 1}


def test_bad_files_are_named(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(FileNotFoundError):
        RobertaPreLayerNormConfig.from_json_file(path)
    path.write_text('{"vocab_size": 3')
    with pytest.raises(ConfigError, match="not valid JSON"):
        RobertaPreLayerNormConfig.from_json_file(path)
    path.write_text("[1]")
    with pytest.raises(ConfigError, match="must hold a JSON object, got list"):
        RobertaPreLayerNormConfig.from_json_file(path)
    path.write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match=r"config\.json: .* another architecture"):
        RobertaPreLayerNormConfig.from_json_file(path)
    path.write_text('{"self": 1, "vocab_size": ' + 5000 * "9" + "}")
    with pytest.raises(ConfigError, match="not valid JSON"):
        RobertaPreLayerNormConfig.from_json_file(path)
    path.write_text("[" * 2**24 + "]")
    with pytest.raises(ConfigError, match="more than 16,777,216 bytes"):
        RobertaPreLayerNormConfig.from_json_file(path)
    path.write_text('{"self": 1}')
    assert RobertaPreLayerNormConfig.from_json_file(path).extra == {"self": 1}


def test_keywords_override_the_file(tmp_path):
    RobertaPreLayerNormConfig().save_pretrained(tmp_path)
    assert RobertaPreLayerNormConfig.from_pretrained(tmp_path, hidden_act="relu").hidden_act == "relu"


def test_too_many_or_repeated_arguments():
    with pytest.raises(TypeError, match="at most 18 positional"):
        RobertaPreLayerNormConfig(*range(19))
    with pytest.raises(TypeError, match="'vocab_size' was given twice"):
        RobertaPreLayerNormConfig(10, vocab_size=10)


def test_an_edited_config_is_checked_by_validate():
    config = RobertaPreLayerNormConfig()
    config.hidden_act = "none"
    with pytest.raises(ConfigError):
        config.validate()
