"""Keywords that scripts written for transformers pass to `from_pretrained` and `save_pretrained`."""

import numpy as np
import pytest

from roberta_pln import backends, checkpoint
from roberta_pln.config import RobertaPreLayerNormConfig
from tests.contract import random_checkpoint, tiny_config

TAKEN = {
    "formats": {"from_pt": True, "from_tf": False, "from_flax": True},
    "types": {"torch_dtype": "float32"},
    "caution": {"trust_remote_code": False, "weights_only": True, "use_safetensors": True},
    "memory": {"low_cpu_mem_usage": True, "device_map": None, "max_memory": None, "offload_folder": None},
    "kernels": {"attn_implementation": "eager"},
    "hub": {"use_auth_token": None, "variant": None, "proxies": None, "resume_download": True, "_commit_hash": None},
    "an encoder's own": {"num_labels": 3, "output_attentions": True, "cache_dir": None, "revision": "main"},
}
REFUSED = {
    "attn_implementation": ("flash_attention_2", "must be one of None, 'eager'.* the fastest kernel"),
    "device_map": ("auto", "device= puts a model of PyTorch on one device"),
    "use_auth_token": ("secret", "token= is its name"),
    "state_dict": ({}, "load_state_dict of a model takes one"),
    "foo": (1, "foo: neither an option of the hub nor a field of the config"),
}


@pytest.fixture(params=backends.installed())
def model_class(request):
    return backends.BACKENDS[request.param].model_class("ForMaskedLM")


@pytest.fixture
def path(tmp_path):
    return random_checkpoint(tmp_path / "model", tiny_config(), "ForMaskedLM")


@pytest.mark.parametrize("name", TAKEN)
def test_taken(model_class, path, name):
    model = model_class.from_pretrained(path, **TAKEN[name])
    assert model.config.num_labels == TAKEN[name].get("num_labels", 2)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(model_class, path, name):
    value, message = REFUSED[name]
    with pytest.raises(TypeError, match=message):
        model_class.from_pretrained(path, **{name: value})


def test_by_their_names(model_class, path, tmp_path):
    """The first arguments too; a config may be named by its path; the type of the weights has an older name."""
    model = model_class.from_pretrained(pretrained_model_name_or_path=path, config=path, torch_dtype="bfloat16")
    assert model.config.dtype == "bfloat16"
    model.save_pretrained(save_directory=tmp_path / "a", max_shard_size="10KB", push_to_hub=False)
    assert checkpoint.open(tmp_path / "a").path.name == "model.safetensors.index.json"
    model.save_pretrained(tmp_path / "b", is_main_process=False)
    assert not (tmp_path / "b").exists()
    with pytest.raises(TypeError, match="push_to_hub must be one of None, False, got True: huggingface_hub's"):
        model.save_pretrained(tmp_path / "b", push_to_hub=True)
    with pytest.raises(TypeError, match="save_pretrained has no option foo"):
        model.save_pretrained(tmp_path / "b", foo=1)


def test_the_format_of_several(model_class, path):
    other = random_checkpoint(path.parent / "other", tiny_config(), "ForMaskedLM", seed=1)
    opened = checkpoint.open(other)
    checkpoint.convert(other, path.parent / "torch", "torch")
    (path.parent / "torch" / "pytorch_model.bin").rename(path / "pytorch_model.bin")
    model = model_class.from_pretrained(path, use_safetensors=False)
    again = model_class.from_pretrained(path, format="torch")
    for found in (model, again):
        found.save_pretrained(path.parent / "saved")
        assert np.array_equal(checkpoint.open(path.parent / "saved")["lm_head.bias"], opened["lm_head.bias"])
    with pytest.warns(UserWarning, match=r"holds model.safetensors, which is used, and also pytorch_model.bin"):
        model_class.from_pretrained(path)


def test_a_pooler_is_for_the_base_model(model_class, path):
    with pytest.raises(TypeError, match="add_pooling_layer is for the base model"):
        model_class.from_pretrained(path, add_pooling_layer=False)


def test_a_config_of_another_library(model_class):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.RobertaPreLayerNormConfig()
    with pytest.raises(TypeError, match=r"got transformers\..*RobertaPreLayerNormConfig; its from_dict makes one"):
        model_class(theirs)
    assert RobertaPreLayerNormConfig.from_dict(theirs.to_dict()).hidden_size == 768


def test_further_keys_of_a_config_are_kept(tmp_path):
    """Set after construction as well, and changed together."""
    config = tiny_config()
    config.task = "ranking"
    config.update({"margin": 0.5, "hidden_dropout_prob": 0.25})
    assert config.use_return_dict is True
    with pytest.raises(ValueError, match="hidden_dropout_prob must be a number in"):
        config.update({"margin": 1.0, "hidden_dropout_prob": 2})
    config.save_pretrained(tmp_path)
    read = RobertaPreLayerNormConfig.from_pretrained(tmp_path)
    assert (read.task, read.margin, read.hidden_dropout_prob) == ("ranking", 0.5, 0.25)
