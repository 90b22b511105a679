"""Where the states of some tokens are wanted, the last layer computes no others, and the numbers are the same.

Tolerances: roundings of 1e-16 of sums of some hundred terms of size 1; see `test_equality`.
"""

import importlib

import numpy as np
import pytest

from roberta_pln import backends
from roberta_pln.checks import InputError
from tests.contract import CONFIGS, HEADS, INPUTS, precision, random_tensors
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
PLACES = {
    "the first": np.zeros((1, 1), int),
    "some of each row": np.array([[3, 1, 1], [0, 9, 4], [10, 2, 8]]),
    "the same of all rows": np.array([[7, 0]]),
}
IDS = INPUTS["no mask"]["input_ids"]
PICKED = np.arange(33).reshape(3, 11)
LABELS = {
    "few": (np.where(PICKED % 9 == 4, IDS, -100), 2),
    "one": (np.where(PICKED == 15, IDS, -100), 1),
    "all of a row": (np.where(PICKED < 11, IDS, -100), 11),
    "none": (np.full((3, 11), -100), 1),
}
"""Labels, and how many the row with most of them has; one token is the least that can be computed."""

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


def pooled(config, states):
    """What the pooler makes of states."""
    weights = random_tensors(config, "Model")
    weight, bias = (
        weights[f"roberta_prelayernorm.pooler.dense.{part}"].astype(np.float64) for part in ("weight", "bias")
    )
    return np.tanh(states @ weight.T + bias)


@pytest.mark.parametrize("case", BASE_CASES)
def test_the_base_model(backend, lengths, case):
    changes, inputs = BASE_CASES[case]
    base = built(backend, changes, "Model")
    every = computed(backend, base, inputs)
    batch, tokens, _ = every["last_hidden_state"].shape
    for places in PLACES.values():
        if len(places) not in (1, batch) or places.max(initial=0) >= tokens:
            continue
        lengths.clear()
        found = computed(backend, base, inputs, places=places)
        wanted, layers = tokens if case in ALL_TOKENS else places.shape[1], base.config.num_hidden_layers
        assert lengths == [tokens] * (layers - 1) + [wanted] * (layers > 0)
        states = np.take_along_axis(every["last_hidden_state"], places[..., None], 1)
        expected = {**every, "last_hidden_state": states}  # a cache is whole
        if "pooler_output" in every:
            expected["pooler_output"] = pooled(base.config, states[:, 0])
        for name in found.keys() | expected.keys():
            np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=OUTPUT_TOLERANCE, err_msg=name)


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


@pytest.mark.parametrize("labels", LABELS)
def test_a_masked_language_model_that_trains(backend, lengths, labels):
    """The last layer computes as many tokens of each row as one has labels at most. `test_labelled` has the numbers."""
    if backend == "flax":
        pytest.skip("XLA compiles for one number of labels, and so for all tokens")
    labels, most = LABELS[labels]
    trained = built(backend, {}, "ForMaskedLM")
    train(backend, trained, labels)
    assert lengths == [11, most]
    lengths.clear()
    train(backend, trained, labels, output_logits=True)
    train(backend, trained, labels, output_attentions=True)
    assert lengths == [11] * 4


@pytest.mark.parametrize("backend", [name for name in backends.installed() if name == "tf"])
@pytest.mark.parametrize("xla", [False, True])
def test_where_xla_compiles_all_tokens_are_computed(backend, lengths, xla):
    """For any number of labels it has one program."""
    import tensorflow as tf

    trained = built(backend, {}, "ForMaskedLM")
    step = tf.function(lambda labels: trained(IDS, labels=labels, training=True).loss, jit_compile=xla)
    for labels, _ in LABELS.values():
        step(tf.constant(labels))
    assert lengths == [11, 11 if xla else None]


def train(backend, model, labels, **options):
    if backend == "pt":
        model.train()
    options = options if backend == "pt" else {**options, "training": True}
    return computed(backend, model, {"input_ids": IDS, "labels": labels}, **options)


@pytest.mark.parametrize("backend", sorted({"pt", "tf"} & set(backends.installed())))
def test_a_head_of_ones_own_reads_all_tokens(backend, lengths):
    """Whatever the class in the place of the language-model head does with them."""
    trained = built(backend, {}, "ForMaskedLM")
    kind = type(trained.lm_head)
    trained.lm_head.__class__ = type("Head", (kind,), {})
    train(backend, trained, LABELS["few"][0])
    assert lengths == [11, 11]


@pytest.mark.parametrize("backend", sorted({"pt", "tf"} & set(backends.installed())))
def test_a_layer_of_ones_own_computes_all_tokens(backend, lengths):
    """Another class in the last layer's place may look at all of them."""
    base = built(backend, {}, "Model")
    last = base.encoder.layer[-1]
    last.__class__ = type("Layer", (type(last),), {})
    found = computed(backend, base, INPUTS["no mask"], places=PLACES["some of each row"])
    assert lengths == [11, 11]
    assert found["last_hidden_state"].shape == (3, 3, 32)


@pytest.mark.parametrize("asked", ["output_attentions", "output_hidden_states"])
def test_what_is_returned_is_whole(backend, lengths, asked):
    base = model(backend, "plain", "Model")
    expected = computed(backend, base, INPUTS["right padding"], **{asked: True})
    found = computed(backend, base, INPUTS["right padding"], places=PLACES["the first"], **{asked: True})
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


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (np.array([[0], [11], [0]]), r"places must be at least 0 and below the number of tokens \(11\), got 11"),
        (np.array([[-1]]), r"places must be at least 0 and below the number of tokens \(11\), got -1"),
        (np.array([[0], [1]]), r"places must have shape \(3, any\) or \(1, any\), got \(2, 1\)"),
        (np.array([[0.0]]), "places must be integers, got float64"),
        (np.zeros((3, 0), int), "places must name a token or more of each row, got none"),
    ],
    ids=["behind the tokens", "below 0", "of another batch", "not integers", "none"],
)
def test_wrong_places_are_refused(backend, places, message):
    with pytest.raises(InputError, match=message):
        computed(backend, model(backend, "plain", "Model"), INPUTS["no mask"], places=places)


@pytest.mark.parametrize("place", [-1, 11])
@pytest.mark.parametrize("backend", sorted({"tf", "flax"} & set(backends.installed())))
def test_wrong_places_in_compiled_code_are_nan(backend, place):
    base, ids = model(backend, "plain", "Model"), INPUTS["no mask"]["input_ids"]
    mask = np.tril(np.ones((3, 11, 11), int))
    with precision(backend, "float64"):
        if backend == "tf":
            import tensorflow as tf

            call = tf.function(lambda places: base(ids, mask, places=places).last_hidden_state)
        else:
            import jax

            call = jax.jit(lambda places: base(ids, mask, places=places).last_hidden_state)
        found = np.asarray(call(np.array([[0, place]])))
    assert np.isfinite(found[:, 0]).all()
    assert np.isnan(found[:, 1]).all()
