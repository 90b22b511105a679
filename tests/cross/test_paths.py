"""What models say about the way that a call takes is the way that it takes."""

import dataclasses

import numpy as np
import pytest

from roberta_pln import backends, paths
from tests.contract import random_ids, tiny_config

NAMES = backends.installed()
IDS = random_ids()
DROPS = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.1)


def model(backend: str, head: str = "ForMaskedLM", **changes):
    built = backends.BACKENDS[backend].model_class(head)(tiny_config(**DROPS, **changes))
    return built.eval() if backend == "pt" else built


def training(backend: str, asked) -> dict[str, bool]:
    """Arguments of a call that trains."""
    if backend == "pt":
        asked.train()
    return {"pt": {}, "tf": {"training": True}, "flax": {"train": True}}[backend]


@pytest.mark.parametrize("backend", NAMES)
def test_a_plain_call(backend):
    assert model(backend).path(input_ids=IDS) == paths.Path(
        paths.WRITTEN_OUT, "float32", "float32", logits="all", rows="padded", compiled=False
    )


@pytest.mark.parametrize("backend", NAMES)
def test_labels_and_segments(backend):
    asked = model(backend)
    plain = asked.path(input_ids=IDS, labels=IDS)
    assert plain.logits == "all"
    assert asked.path(input_ids=IDS, output_logits=False).logits == "none"
    options = training(backend, asked)
    trained = asked.path(input_ids=IDS, labels=IDS, segment_ids=np.ones_like(IDS), **options)
    assert dataclasses.replace(plain, logits="labelled tokens, in chunks", rows="packed") == trained
    assert asked.path(input_ids=IDS, labels=IDS, output_logits=True, **options).logits == "all"
    assert str(trained).startswith("attention: products and softmax, dtype: float32, parameters: float32, logits: labe")


@pytest.mark.skipif("pt" not in NAMES, reason="only PyTorch has a fused kernel")
@pytest.mark.parametrize(
    ("inputs", "changes", "fused"),
    [
        ({}, {}, True),
        ({"output_attentions": True}, {}, False),
        ({"head_mask": np.ones(4)}, {}, False),
        ({}, {"output_attentions": True}, False),
        ({}, {"position_embedding_type": "relative_key"}, False),
    ],
)
def test_the_fused_kernel_is_called_where_it_is_named(inputs, changes, fused, monkeypatch):
    import torch

    calls, kernel = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **b: calls.append(1) or kernel(*a, **b)
    )
    asked = model("pt", **changes)
    with torch.no_grad():
        assert asked.path(input_ids=IDS, **inputs).attention == (paths.FUSED if fused else paths.WRITTEN_OUT)
        asked(IDS, **{**inputs, **({"head_mask": torch.ones(4)} if "head_mask" in inputs else {})})
    assert bool(calls) == fused


@pytest.mark.skipif("pt" not in NAMES, reason="of PyTorch")
def test_types_in_pytorch():
    import torch

    asked = model("pt")
    with torch.autocast("cpu", torch.bfloat16):
        told = asked.path(input_ids=IDS)
    assert (told.dtype, told.parameters) == ("bfloat16", "float32")


@pytest.mark.skipif("tf" not in NAMES, reason="of TensorFlow")
def test_types_and_graphs_in_tensorflow():
    import tensorflow as tf

    asked = backends.BACKENDS["tf"].model_class("ForMaskedLM")(tiny_config(), dtype="mixed_bfloat16")
    told = []
    tf.function(lambda: told.append(asked.path(input_ids=IDS)))()
    assert (told[0].dtype, told[0].parameters, told[0].compiled) == ("bfloat16", "float32", True)


@pytest.mark.skipif("flax" not in NAMES, reason="of Flax")
def test_types_and_compilation_in_flax():
    import jax

    asked = backends.BACKENDS["flax"].model_class("ForMaskedLM")(tiny_config(), dtype="bfloat16", param_dtype="float32")
    told = []
    jax.jit(lambda x: told.append(asked.path(input_ids=IDS)) or x)(1)
    assert (told[0].dtype, told[0].parameters, told[0].compiled) == ("bfloat16", "float32", True)
