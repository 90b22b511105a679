"""`generation_config.json` travels with the weights, through every backend."""

import json

import pytest

from roberta_pln import backends, checkpoint
from roberta_pln.config import ConfigError
from roberta_pln.generation import GENERATION_CONFIG_FILE, GenerationConfig
from tests.contract import tiny_config
from tests.generation.common import PROMPTS, generate, saved

INPUTS = PROMPTS["padding on every side"]
FILE = {"max_new_tokens": 3, "suppress_tokens": [2], "transformers_version": "4.57.6", "_from_model_config": True}


def model_class(backend: str, head: str = "ForCausalLM"):
    return backends.BACKENDS[backend].model_class(head)


@pytest.fixture
def folder(tmp_path):
    """A checkpoint with a `generation_config.json`."""
    checkpoint.convert(saved(), tmp_path / "model", "safetensors")
    (tmp_path / "model" / GENERATION_CONFIG_FILE).write_text(json.dumps(FILE))
    return tmp_path / "model"


def columns(model) -> int:
    """New tokens of a call without options."""
    return generate(model, INPUTS)["log_probs"].shape[1]


def test_it_is_read_and_written(backend, folder, tmp_path):
    """Keys that mean nothing here come back as they were."""
    model = model_class(backend).from_pretrained(folder)
    assert model.generation_config == GenerationConfig.from_dict(FILE)
    assert columns(model) == 3
    model.generation_config.max_new_tokens = 2
    for safe in (True, False):
        model.save_pretrained(tmp_path / str(safe), safe_serialization=safe)
        assert json.loads((tmp_path / str(safe) / GENERATION_CONFIG_FILE).read_text()) == {**FILE, "max_new_tokens": 2}
        assert columns(model_class(backend).from_pretrained(tmp_path / str(safe))) == 2


def test_it_survives_a_conversion(backend, folder, tmp_path):
    format = backends.BACKENDS[backend].native_format
    checkpoint.convert(folder, tmp_path / "converted", format)
    assert json.loads((tmp_path / "converted" / GENERATION_CONFIG_FILE).read_text()) == FILE
    assert columns(model_class(backend).from_pretrained(tmp_path / "converted")) == 3


def test_without_a_file_the_config_decides(backend, tmp_path):
    """As in files that are older than `generation_config.json`."""
    model = model_class(backend).from_pretrained(saved())
    assert model.generation_config == GenerationConfig()
    config = tiny_config(vocab_size=40, is_decoder=True, max_length=11, num_beams=2)
    model = model_class(backend)(config)
    assert model.generation_config == GenerationConfig(max_length=11, num_beams=2)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / GENERATION_CONFIG_FILE).read_text()) == {"max_length": 11, "num_beams": 2}
    assert model_class(backend).from_pretrained(tmp_path).generation_config == model.generation_config


def test_a_file_that_breaks_a_rule_is_refused(backend, folder):
    (folder / GENERATION_CONFIG_FILE).write_text(json.dumps({"num_beams": 0}))
    with pytest.raises(ConfigError, match=r"generation_config.json: num_beams must be an integer of at least 1, got 0"):
        model_class(backend).from_pretrained(folder)
    (folder / GENERATION_CONFIG_FILE).write_text("[]")
    with pytest.raises(ConfigError, match=r"generation_config.json must hold a JSON object, got list"):
        model_class(backend).from_pretrained(folder)


def test_other_heads_have_none(backend, folder, tmp_path):
    """They neither read the file nor write it."""
    (folder / GENERATION_CONFIG_FILE).write_text(json.dumps({"num_beams": 0}))
    model = model_class(backend, "ForMaskedLM").from_pretrained(folder)
    assert model.generation_config is None
    assert not hasattr(model, "generate")
    model.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other" / GENERATION_CONFIG_FILE).exists()


def test_an_old_file_does_not_stay(backend, folder):
    """Saving a model over another replaces its settings, even by none."""
    model_class(backend).from_pretrained(saved()).save_pretrained(folder)
    assert json.loads((folder / GENERATION_CONFIG_FILE).read_text()) == {}
    assert columns(model_class(backend).from_pretrained(folder)) > 3
