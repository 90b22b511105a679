"""A head that reads the first token alone has the last layer compute no other, and the numbers are the same.

Tolerances: roundings of 1e-16 of sums of some hundred terms of size 1; see `test_equality`.
"""

import importlib

import numpy as np
import pytest

from roberta_pln import backends
from roberta_pln.checks import InputError
from tests.contract import CONFIGS, HEADS, INPUTS, precision
from tests.cross.test_equality import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, built, model, run

HEAD_CASES = "classes", "several values", "choices"
ENCODER = {"input_ids": INPUTS["right padding"]["input_ids"], "encoder_hidden_states": np.ones((3, 5, 32)) * 0.3}
BASE_CASES = {
    **{f"plain, {name}": ({}, inputs) for name, inputs in INPUTS.items()},
    **{name: (changes, INPUTS["right padding"]) for name, changes in CONFIGS.items() if changes},
    "with an encoder": (
        {"is_decoder": True, "add_cross_attention": True},
        {**ENCODER, "encoder_attention_mask": np.arange(165).reshape(3, 11, 5) % 3},
    ),
}
ALL_TOKENS = {"relative_key", "relative_key_query", "chunked feed-forward"}
"""Where the last layer cannot leave any out."""


@pytest.fixture(params=backends.installed())
def backend(request):
    return request.param


@pytest.fixture
def lengths(backend, monkeypatch):
    """How many tokens each layer's feed-forward block has been given."""
    layer = importlib.import_module(f"roberta_pln.{backend}.encoder").Layer
    found, feed_forward = [], layer.feed_forward

    def counting(self, hidden_states, *args):
        found.append(hidden_states.shape[1])
        return feed_forward(self, hidden_states, *args)

    monkeypatch.setattr(layer, "feed_forward", counting)
    return found


def computed(backend, model, inputs, **options):
    """What a call returns, in NumPy."""
    with precision(backend, "float64"):
        return {name: to_numpy(value) for name, value in model(**inputs, **options).named_arrays()}


def to_numpy(value):
    return value.detach().numpy() if hasattr(value, "detach") else np.asarray(value)


@pytest.mark.parametrize("case", BASE_CASES)
def test_the_base_model(backend, lengths, case):
    changes, inputs = BASE_CASES[case]
    base = built(backend, changes, "Model")
    every = computed(backend, base, inputs)
    lengths.clear()
    first = computed(backend, base, inputs, first_token_only=True)
    tokens = every["last_hidden_state"].shape[1]
    layers = base.config.num_hidden_layers
    assert lengths == [tokens] * (layers - 1) + [tokens if case in ALL_TOKENS else 1] * (layers > 0)
    assert first.keys() == every.keys()  # a cache is whole
    every["last_hidden_state"] = every["last_hidden_state"][:, :1]
    for name, array in first.items():
        np.testing.assert_allclose(array, every[name], rtol=0, atol=OUTPUT_TOLERANCE, err_msg=name)


@pytest.mark.parametrize("case", HEAD_CASES)
def test_heads(backend, lengths, case, monkeypatch):
    """Outputs and gradients."""
    head, changes, inputs = HEADS[case]
    classifier = built(backend, changes, head)
    outputs = computed(backend, classifier, inputs)
    assert lengths == [11, 1]
    lengths.clear()
    gradients = run(backend, classifier, inputs)
    assert lengths == [11, 11, 11, 1]  # first with hidden states, which are of all tokens
    encoder = importlib.import_module(f"roberta_pln.{backend}.encoder").Encoder
    monkeypatch.setattr(encoder, "can_leave_out", lambda self: False)
    lengths.clear()
    expected = run(backend, classifier, inputs)
    assert lengths == [11] * 4
    for name, array in outputs.items():
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=OUTPUT_TOLERANCE, err_msg=name)
    for name, array in gradients.items():
        scale = max(1.0, np.abs(expected[name]).max())
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=GRADIENT_TOLERANCE * scale, err_msg=name)


@pytest.mark.parametrize("asked", ["output_attentions", "output_hidden_states"])
def test_what_is_returned_is_whole(backend, lengths, asked):
    base = model(backend, "plain", "Model")
    expected = computed(backend, base, INPUTS["right padding"], **{asked: True})
    found = computed(backend, base, INPUTS["right padding"], first_token_only=True, **{asked: True})
    assert lengths == [11] * 4
    expected["last_hidden_state"] = expected["last_hidden_state"][:, :1]
    assert all(np.array_equal(found[name], array) for name, array in expected.items())


def test_who_looks_at_layers_sees_all_tokens(backend, lengths):
    """Hooks of PyTorch, wherever they are, and what Linen captures."""
    classifier, inputs = built(backend, {}, "ForSequenceClassification"), {"input_ids": INPUTS["no mask"]["input_ids"]}
    if backend == "pt":
        base = classifier.roberta_prelayernorm
        for module in (base, base.encoder, base.LayerNorm, base.encoder.layer[-1].output.dense):
            lengths.clear()
            shapes = []
            watch = module.register_forward_hook(
                lambda _module, _inputs, found, to=shapes: to.append(getattr(found, "last_hidden_state", found).shape)
            )
            computed(backend, classifier, inputs)
            watch.remove()
            assert lengths == [11, 11]
            assert shapes == [(3, 11, 32)]
    elif backend == "flax":
        with precision(backend, "float64"):
            _, seen = classifier.module.apply({"params": classifier.params}, **inputs, capture_intermediates=True)
        assert lengths == [11, 11]
        (record,) = seen["intermediates"]["roberta_prelayernorm"]["__call__"]
        assert record.last_hidden_state.shape == (3, 11, 32)
    else:
        pytest.skip("Keras has no hooks")


def test_it_is_a_switch(backend):
    with pytest.raises(InputError, match="first_token_only must be True or False"):
        computed(backend, model(backend, "plain", "Model"), INPUTS["no mask"], first_token_only=1)
