"""What is drawn: fresh weights as the schema says, and dropout at its places with its rates, in every backend.

Statistics of n draws may be off by five of their standard errors, which one in two million is. The seeds are fixed.
"""

import importlib
import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from roberta_pln import backends, checkpoint, schema
from tests.contract import load, random_tensors, tiny_config

NAMES = backends.installed()
PREFIX = schema.PREFIX


def within(mean: float, expected: float, error: float) -> None:
    """Check a mean against what is expected, given its standard error."""
    assert abs(mean - expected) <= 5 * error, f"{mean} is not {expected} +- 5 * {error}"


# ---------------------------------------------------------------- fresh weights

SCALE = 0.05
EVERYTHING = dict(
    is_decoder=True,
    add_cross_attention=True,
    position_embedding_type="relative_key",
    tie_word_embeddings=False,
    initializer_range=SCALE,
    num_hidden_layers=1,
    hidden_act="xielu",
)
"""A config whose models have parameters of all kinds but one."""


def fresh(backend: str, head: str, seed: int = 0, **changes) -> dict[str, np.ndarray]:
    """The canonical tensors of a model that was only constructed."""
    weights = importlib.import_module(f"roberta_pln.{backend}.weights")
    model_class, config = backends.BACKENDS[backend].model_class(head), tiny_config(**changes)
    if backend == "pt":
        importlib.import_module("torch").manual_seed(seed)
        return weights.dump(model_class(config))
    model = model_class(config, seed=seed)
    return weights.dump(model, model.params) if backend == "flax" else weights.dump(model)


def check_fresh(config, parameter: schema.Parameter, values: np.ndarray) -> None:
    """Check one parameter against its row."""
    assert values.shape == parameter.shape
    if parameter.module.padding:
        assert not values[config.pad_token_id].any()
        values = np.delete(values, config.pad_token_id, axis=0)
    if parameter.initializer == "normal":
        within(values.mean(), 0, SCALE / math.sqrt(values.size))
        within(values.std(), SCALE, SCALE / math.sqrt(2 * values.size))
    else:
        np.testing.assert_array_equal(values, np.float32(parameter.initializer))


def check_normal(values: np.ndarray) -> None:
    """Check the shares of values beyond one, two, three and four standard deviations."""
    for bound in (1, 2, 3, 4):
        share = math.erfc(bound / math.sqrt(2))
        within((np.abs(values) > bound * SCALE).mean(), share, math.sqrt(share * (1 - share) / values.size))


@pytest.mark.parametrize("head", schema.HEADS)
@pytest.mark.parametrize("backend", NAMES)
def test_fresh_weights_follow_the_schema(backend, head):
    config, tensors = tiny_config(**EVERYTHING), fresh(backend, head, **EVERYTHING)
    parameters = schema.expand(config, head)
    assert tensors.keys() == parameters.keys()
    for name, parameter in parameters.items():
        check_fresh(config, parameter, tensors[name])
    drawn = [tensors[name][-1].tobytes() for name in parameters if parameters[name].initializer == "normal"]
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("backend", NAMES)
def test_fresh_slopes_and_big_tables(backend):
    changes = dict(vocab_size=8000, initializer_range=SCALE, num_hidden_layers=1, hidden_act="prelu")
    tensors = fresh(backend, "ForMaskedLM", **changes)
    assert tensors[f"{schema.LAYER.format(i=0)}.intermediate.intermediate_act_fn.weight"] == 0.25
    check_normal(tensors[f"{PREFIX}.embeddings.word_embeddings.weight"][2:])
    again, other = (fresh(backend, "ForMaskedLM", seed, **changes) for seed in (0, 1))
    assert all(np.array_equal(tensors[name], again[name]) for name in tensors)
    assert not np.array_equal(tensors["lm_head.dense.weight"], other["lm_head.dense.weight"])


def draws(scale: float = SCALE, shape: tuple[int, ...] = (99, 32)) -> np.ndarray:
    values = scale * np.random.default_rng(0).standard_normal(shape)
    values[1] = 0
    return values


WRONG_TABLES = {
    "another scale": draws(0.9 * SCALE),
    "another mean": draws() + 0.1 * SCALE,
    "a pad row": np.where(np.arange(99)[:, None] == 1, SCALE, draws()),
    "zeros": np.zeros((99, 32)),
}


@pytest.mark.parametrize("wrong", WRONG_TABLES)
def test_wrong_weights_are_seen(wrong):
    """The control."""
    config = tiny_config()
    parameter = schema.expand(config, "Model")[f"{PREFIX}.embeddings.word_embeddings.weight"]
    check_fresh(config, parameter, draws())
    with pytest.raises(AssertionError):
        check_fresh(config, parameter, WRONG_TABLES[wrong])


def test_wrong_distributions_are_seen():
    """The control: truncated draws, also when scaled to the right deviation, and uniform ones."""
    values = draws(shape=(8000, 32))[2:].ravel()
    check_normal(values)
    truncated = values[np.abs(values) < 2 * SCALE]
    uniform = np.random.default_rng(0).uniform(-SCALE * math.sqrt(3), SCALE * math.sqrt(3), values.size)
    for wrong in (truncated, truncated * SCALE / truncated.std(), uniform):
        with pytest.raises(AssertionError):
            check_normal(wrong)


# ---------------------------------------------------------------- dropout
#
# The models here have weights that show every place. Both norms that begin and end the stack give ones; attention is
# uniform and its values are one; of the hidden axis, every third element shows the output of self-attention, the next
# that of cross-attention, the next that of the feed-forward block. Without dropout all of these are one.

WIDTH, HEADS, BATCH, TOKENS, STATES = 24, 2, 60, 10, 7
GLASS = dict(hidden_size=WIDTH, num_attention_heads=HEADS, intermediate_size=5, max_position_embeddings=70)
INPUTS = {
    "Model": {
        "input_ids": np.full((BATCH, TOKENS), 5),
        "attention_mask": np.ones((BATCH, TOKENS, TOKENS), int),
        "encoder_hidden_states": np.ones((BATCH, STATES, WIDTH), np.float32),
    },
    "ForMultipleChoice": {"input_ids": np.full((BATCH, 20, 2), 5)},
}
CHANGES = {
    "Model": {"is_decoder": True, "add_cross_attention": True, "use_cache": False},
    "ForSequenceClassification": {"num_hidden_layers": 0, "num_labels": WIDTH},
    "ForTokenClassification": {"num_hidden_layers": 0, "num_labels": WIDTH},
}


def every_third(start: int) -> np.ndarray:
    return (np.arange(WIDTH) % 3 == start).astype(np.float32)


def glass(config, head: str) -> dict[str, np.ndarray]:
    """Weights that show every place of dropout; those of language-model heads and of `qa_outputs` are random."""
    tensors = random_tensors(config, head)
    for name, value in tensors.items():
        if name.startswith(PREFIX):
            value[...] = 0
        if name.endswith((f"{PREFIX}.LayerNorm.bias", "embeddings.LayerNorm.bias", "self.value.bias")):
            value[...] = 1
        elif name.endswith(".attention.output.dense.weight"):
            value[...] = np.diag(every_third(0))
        elif name.endswith(".crossattention.output.dense.weight"):
            value[...] = np.diag(every_third(1))
        elif ".layer." in name and name.endswith(".output.dense.bias") and "attention" not in name:
            value[...] = every_third(2)
        elif name.endswith("pooler.dense.bias"):
            value[...] = 20  # its tanh is one
        elif name.startswith("classifier."):
            value[...] = np.eye(*value.shape) if value.ndim == 2 else name == "classifier.dense.bias"
    return tensors


def in_pytorch(model, inputs, seed):
    import torch

    from roberta_pln.pt import weights

    torch.manual_seed(0 if seed is None else seed)
    with torch.no_grad():
        record = model.train(seed is not None)(**inputs, **FLAGS)
    return {name: weights.to_array(value) for name, value in record.named_arrays()}


def in_tensorflow(model, inputs, seed):
    record = model(**inputs, **FLAGS, training=seed is not None)
    return {name: value.numpy() for name, value in record.named_arrays()}


def in_flax(model, inputs, seed):
    import jax

    key = None if seed is None else jax.random.key(seed)
    record = model(**inputs, **FLAGS, train=key is not None, dropout_rng=key)
    return {name: np.asarray(value) for name, value in record.named_arrays()}


FLAGS = dict(output_hidden_states=True, output_attentions=True)
CALLS = {"pt": in_pytorch, "tf": in_tensorflow, "flax": in_flax}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of every head, with the weights that show dropout."""
    root = tmp_path_factory.mktemp("glass")
    for head in schema.HEADS:
        config = tiny_config(**GLASS, **CHANGES.get(head, {"num_hidden_layers": 0}))
        checkpoint.save(glass(config, head), root / head, config, head)
    return root


def answer(backend: str, folder: Path, head: str, seed: int | None, rates: dict, dtype: str = "float32"):
    """The outputs of a model with some rates of dropout: in training with a seed, in evaluation without one."""
    options = {"seed": seed} if backend == "tf" else {}
    model = load(backend, folder / head, head, dtype, **rates, **options)
    arrays = CALLS[backend](model, INPUTS.get(head, {"input_ids": np.full((BATCH, TOKENS), 5)}), seed)
    return {name: array.astype(np.float64) for name, array in arrays.items()}


def rates(hidden: float = 0.0, attention: float = 0.0, classifier: float | None = None) -> dict[str, float | None]:
    return dict(hidden_dropout_prob=hidden, attention_probs_dropout_prob=attention, classifier_dropout=classifier)


def places(arrays: dict[str, np.ndarray], rate: float = 0.0) -> dict[str, list[np.ndarray]]:
    """What is seen of each place, in each layer, scaled so that it is one without dropout.

    Two places follow each other in a sequence classifier; `rate` is the one in front of its first layer.
    """
    seen = {"embeddings": [arrays["hidden_states.0"]]}
    if "hidden_states.2" in arrays:
        states = [arrays[f"hidden_states.{i}"] for i in range(3)]
        steps = [after - before for before, after in itertools.pairwise(states)]
        seen["attention"] = [arrays[f"attentions.{i}"] * TOKENS for i in range(2)]
        seen["cross-attention"] = [arrays[f"cross_attentions.{i}"] * STATES for i in range(2)]
        for third, branch in enumerate(("attention", "cross-attention", "feed-forward")):
            seen[f"{branch} output"] = [step[..., third::3] for step in steps]
        seen["final norm"], seen["pooler"] = [arrays["last_hidden_state"]], [arrays["pooler_output"]]
    elif arrays["logits"].shape == (BATCH, WIDTH):  # of out_proj(tanh(dense(x))), dropped(tanh(1 + dropped(1)))
        activated = arrays["logits"] * (1 - rate)
        with np.errstate(invalid="ignore"):  # of wrong scales
            first = np.arctanh(activated[activated != 0]) - 1
        seen["before dense"] = [np.where(np.abs(first) < 1e-5, 0, first)]  # float32
        seen["before out_proj"] = [(activated != 0) / (1 - rate)]  # were it scaled otherwise, so would be the first
    else:
        seen["before classifier"] = [arrays["logits"]]
    return seen


def check_dropout(values: np.ndarray, rate: float, precision: float = 1e-5) -> None:
    """Check the share of zeros, the scale of the others, and that each element is drawn by itself."""
    kept = values != 0
    if rate < 1:  # 1e-5: float32, behind the difference of two sums of up to ten
        np.testing.assert_allclose(values[kept], 1 / (1 - rate), rtol=precision)
    share = 1 - rate
    within(kept.mean(), share, math.sqrt(share * rate / kept.size))
    for axis in range(kept.ndim):
        left, right = (np.delete(kept, index, axis) for index in (-1, 0))  # neighbours
        if left.size:  # each is in two pairs, whose products go together
            variance = share**2 * (1 - share**2) + 2 * (share**3 - share**4)
            within((left & right).mean(), share**2, math.sqrt(variance / left.size))


def check_apart(one: np.ndarray, other: np.ndarray, rate: float) -> None:
    """Check that two patterns are drawn apart."""
    both = (1 - rate) ** 2
    within(((one != 0) & (other != 0)).mean(), both, math.sqrt(both * (1 - both) / one.size))


IN_STACK = (
    {"embeddings", "attention output", "cross-attention output", "feed-forward output"},
    {"attention", "cross-attention"},
    {"final norm", "pooler"},
)
"""The places of the base model with the hidden rate, with the rate of attention, and with none."""

CASES = {
    "hidden alone": ("Model", rates(hidden=0.3), zip(IN_STACK, (0.3, 0.0, 0.0), strict=True)),
    # What attention mixes shows the dropped probabilities, see the next test.
    "attention alone": (
        "Model",
        rates(attention=0.2),
        (({"embeddings", "feed-forward output"}, 0.0), (IN_STACK[1], 0.2)),
    ),
    "classifier alone": ("Model", rates(classifier=0.5), zip(IN_STACK, (0.0, 0.0, 0.0), strict=True)),
    "everything is dropped": ("Model", rates(hidden=1.0), ((IN_STACK[0], 1.0),)),
}
for _head, _places, _given in (
    ("ForSequenceClassification", {"before dense", "before out_proj"}, (0.4, 0.0)),
    ("ForTokenClassification", {"before classifier"}, (0.4, 0.0)),
    ("ForMultipleChoice", {"before classifier"}, (0.1, 0.3)),
):
    for _name, _rates, _rate in (
        ("a rate of its own", rates(hidden=0.1, attention=0.1, classifier=0.4), _given[0]),
        ("zero of its own", rates(hidden=0.3, classifier=0.0), _given[1]),
        ("the hidden rate", rates(hidden=0.3, attention=0.1), 0.3),
        ("not that of attention", rates(attention=0.5), 0.0),
    ):
        _expected = (({"embeddings"}, _rates["hidden_dropout_prob"]), (_places, _rate))
        CASES[f"{_head}: {_name}"] = (_head, _rates, _expected)
CASES = {name: (head, given, list(expected)) for name, (head, given, expected) in CASES.items()}
"""Head, rates of the config, and the rates at some places."""


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", NAMES)
def test_dropout_at_each_place(backend, case, folder):
    head, given, expected = CASES[case]
    seen = places(answer(backend, folder, head, 1, given), 0.0 if head == "Model" else expected[-1][1])
    for names, rate in expected:
        arrays = [array for name in sorted(names) for array in seen[name]]
        for array in arrays:
            check_dropout(array, rate)
        for one, other in itertools.combinations(arrays, 2):
            if one.shape == other.shape and 0 < rate < 1:
                check_apart(one, other, rate)


@pytest.mark.parametrize("backend", NAMES)
def test_dropped_probabilities_are_what_mixes_the_values(backend, folder):
    arrays = answer(backend, folder, "Model", 1, rates(attention=0.2))
    seen = places(arrays)
    for name, key in (("attention", "attentions"), ("cross-attention", "cross_attentions")):
        for i, output in enumerate(seen[f"{name} output"]):
            sums = arrays[f"{key}.{i}"].sum(-1).swapaxes(1, 2)  # (B, T, H), of values that are one
            np.testing.assert_allclose(output, np.repeat(sums, WIDTH // HEADS // 3, axis=-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForCausalLM", "ForQuestionAnswering"])
@pytest.mark.parametrize("backend", NAMES)
def test_heads_without_dropout(backend, head, folder):
    trained, evaluated = (answer(backend, folder, head, seed, rates(0.5, 0.5, 0.5)) for seed in (1, None))
    check_dropout(trained["hidden_states.0"], 0.5)
    for name in ("start_logits", "end_logits") if head == "ForQuestionAnswering" else ("logits",):
        np.testing.assert_allclose(trained[name], evaluated[name], rtol=0, atol=1e-5)  # float32
        assert np.abs(evaluated[name]).max() > 0.1


@pytest.mark.parametrize("backend", NAMES)
def test_seeds_and_evaluation(backend, folder):
    run = [answer(backend, folder, "Model", seed, rates(0.3, 0.2)) for seed in (1, 1, 2, None, None)]
    plain = answer(backend, folder, "Model", None, rates())
    for name in plain:
        np.testing.assert_array_equal(run[0][name], run[1][name], name)
        np.testing.assert_array_equal(run[3][name], run[4][name], name)
        np.testing.assert_array_equal(run[3][name], plain[name], name)
        if name.startswith(("hidden_states", "attentions", "cross_attentions")):
            assert not np.array_equal(run[0][name], run[2][name])
            assert not np.array_equal(run[0][name], run[3][name])


@pytest.mark.parametrize("backend", NAMES)
def test_rates_hold_in_half_precision(backend, folder):
    arrays = answer(backend, folder, "Model", 1, rates(hidden=0.1), "bfloat16")
    check_dropout(arrays["hidden_states.0"], 0.1, precision=2**-8)  # bfloat16 rounds to 2^-9 of a number


_RNG = np.random.default_rng(0)
DROPPED = (_RNG.random((60, 4, 10, 10)) >= 0.3) / 0.7
WRONG_DROPOUT = {
    "not scaled": (DROPPED > 0) * 1.0,
    "another rate": (_RNG.random((60, 4, 10, 10)) >= 0.25) / 0.7,
    "one pattern for the batch": np.repeat(DROPPED[:1], 60, axis=0),
    "one pattern for all heads": np.repeat(DROPPED[:, :1], 4, axis=1),
    "whole rows": np.repeat(DROPPED[..., :1], 10, axis=-1),
    "nothing": np.ones((60, 4, 10, 10)),
}


@pytest.mark.parametrize("wrong", WRONG_DROPOUT)
def test_wrong_dropout_is_seen(wrong):
    """The control."""
    check_dropout(DROPPED, 0.3)
    with pytest.raises(AssertionError):
        check_dropout(WRONG_DROPOUT[wrong], 0.3)


def test_the_same_pattern_twice_is_seen():
    """The control."""
    check_apart(DROPPED[:30], DROPPED[30:], 0.3)
    with pytest.raises(AssertionError):
        check_apart(DROPPED, DROPPED, 0.3)


@pytest.mark.parametrize("case", CASES)
def test_other_rates_are_seen(case, folder):
    """The control: a model whose rates are not those of the case."""
    head, _, expected = CASES[case]
    arrays = answer(NAMES[0], folder, head, 1, rates(hidden=0.2, attention=0.1, classifier=0.2))
    seen = places(arrays, 0.0 if head == "Model" else expected[-1][1])
    for names, rate in expected:
        for name in names - IN_STACK[2]:  # where nothing is ever dropped
            with pytest.raises(AssertionError):
                check_dropout(seen[name][0], rate)
