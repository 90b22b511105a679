"""A language model that trains computes its head where there are labels only, a chunk at a time: the same numbers.

The tolerances: one rounding in float64 is about 1e-16 of a number; both ways make the same sums, of some hundred terms,
in another order, so 1e-12 of each gradient's largest entry leaves a factor of about a hundred. bfloat16 rounds at
2**-8, four times between the states and the loss.
"""

import importlib
import tempfile
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest

from roberta_pln import backends, numerics, parity
from roberta_pln.checks import InputError
from tests.contract import INPUTS, load, precision, random_checkpoint, random_ids, tiny_config, with_labels

TOLERANCE = 1e-12
NAMES = backends.installed()
HEADS = {
    "masked": ("ForMaskedLM", {}),
    "masked, untied": ("ForMaskedLM", {"tie_word_embeddings": False}),
    "causal": ("ForCausalLM", {"is_decoder": True}),
}
IDS = random_ids()
LABELS = {
    "few": with_labels(INPUTS["right padding"])["labels"],
    "all": random_ids(seed=1),
    "one": np.where(np.arange(33).reshape(3, 11) == 15, IDS, -100),
    "in one row": np.where(np.arange(3)[:, None] == 1, IDS, -100),
    "none": np.full((3, 11), -100),
}
CHUNKS = {"one chunk": numerics.LOGITS_PER_CHUNK, "chunks of five rows": 5 * 99, "one row at a time": 1}


@cache
def model(backend: str, head: str, dtype: str = "float64", **options):
    name, changes = HEADS[head]
    config = tiny_config(num_hidden_layers=1, **changes)
    with tempfile.TemporaryDirectory() as folder, precision(backend, dtype):
        return load(backend, random_checkpoint(Path(folder), config, name), name, dtype, **options)


def chunked(backend: str, monkeypatch: pytest.MonkeyPatch, logits: int) -> None:
    """Let a chunk have no more than so many logits."""
    monkeypatch.setattr(importlib.import_module(f"roberta_pln.{backend}.losses"), "LOGITS_PER_CHUNK", logits)


def run_pt(model, inputs, **options):
    import torch

    from roberta_pln.pt import weights

    model.train().zero_grad()
    record = model(**{name: torch.as_tensor(value) for name, value in inputs.items()}, **options)
    record.loss.backward()
    found = ((name, weights.get(model, item)) for name, item in model.parameters_of_schema.items())
    return record, {name: weights.to_array(value.grad) for name, value in found}


def run_tf(model, inputs, **options):
    import tensorflow as tf

    from roberta_pln.tf import weights

    parameters = model.parameters_of_schema.values()
    with tf.GradientTape() as tape:
        record = model(**inputs, **{"training": True, **options})
    found = tape.gradient(record.loss, [weights.get(model, item).value for item in parameters])
    arrays = [tf.convert_to_tensor(gradient).numpy() for gradient in found]
    return record, {
        item.name: array.T if item.leaf.transposed else array for item, array in zip(parameters, arrays, strict=True)
    }


@cache
def compiled_flax(model, chunk: int, options: tuple):
    import jax

    def loss(params, inputs):
        record = model(**inputs, params=params, train=True, dropout_rng=jax.random.key(0), **dict(options))
        return record.loss, record

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def run_flax(model, inputs, **options):
    from roberta_pln.flax import losses, weights

    chunk = 0 if options.get("output_logits") else losses.LOGITS_PER_CHUNK
    step = compiled_flax(model, chunk, tuple(options.items()))
    (_, record), found = step(model.params, inputs)
    return record, weights.dump(model, found)


RUNS = {"pt": run_pt, "tf": run_tf, "flax": run_flax}


def run(backend: str, model, labels: np.ndarray, **options):
    """The record of a call in training, and the loss with every gradient by name."""
    inputs = {**INPUTS["right padding"], "labels": labels}
    dtype = str(model.dtype).removeprefix("torch.") if backend != "tf" else model.dtype_policy.compute_dtype
    with precision(backend, dtype):
        record, gradients = RUNS[backend](model, inputs, **options)
        arrays = {f"gradient.{name}": np.asarray(value) for name, value in gradients.items()}
        loss = record.loss.detach() if backend == "pt" else record.loss
        return record, {"loss": np.asarray(loss), **arrays}


def failures(answers: dict[str, dict[str, np.ndarray]]) -> list[str]:
    """Every difference above the tolerance, in words."""
    return [
        f"{difference.name}: {difference.relative:.1e}"
        for difference in parity.differences(answers, "float64")
        if not difference.relative <= TOLERANCE
    ]


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("backend", NAMES)
def test_loss_and_gradients_are_those_of_the_logits(backend, head, labels, chunk, monkeypatch):
    chunked(backend, monkeypatch, CHUNKS[chunk])
    record, ours = run(backend, model(backend, head), LABELS[labels])
    plain, expected = run(backend, model(backend, head), LABELS[labels], output_logits=True)
    assert record.keys() == ("loss",)
    assert plain.keys() == ("loss", "logits")
    assert np.isnan(ours["loss"]) == (labels == "none")
    assert all(np.isfinite(array).all() for name, array in ours.items() if name != "loss")
    assert all(array.dtype == np.float64 for array in ours.values())
    if labels == "none":
        assert np.isnan(expected.pop("loss")) == np.isnan(ours.pop("loss"))
    assert failures({"labelled": ours, "plain": expected}) == []


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.skipif(len(NAMES) < 2, reason="a comparison needs two backends")
def test_backends_agree(head):
    answers = {backend: run(backend, model(backend, head), LABELS["few"])[1] for backend in NAMES}
    assert failures(answers) == []


@pytest.mark.parametrize("head", ["masked", "causal"])
@pytest.mark.parametrize("backend", NAMES)
def test_no_texts(backend, head):
    """A batch of none has a loss as one without labels has, and moves nothing."""
    ids = np.zeros((0, 11), np.int64)
    with precision(backend, "float64"):
        record, gradients = RUNS[backend](model(backend, head), {"input_ids": ids, "labels": ids})
        assert np.isnan(float(record.loss))
        assert not any(np.asarray(array).any() for array in gradients.values())


@pytest.mark.parametrize("backend", NAMES)
def test_a_chunk_left_out_is_seen(backend, monkeypatch):
    """The control: the labels of the last of three chunks count, but are not computed."""
    chunked(backend, monkeypatch, 11 * 99)
    every, fewer = LABELS["all"], LABELS["all"].copy()
    fewer[2] = -100
    _, expected = run(backend, model(backend, "masked"), every, output_logits=True)
    _, ours = run(backend, model(backend, "masked"), fewer)
    names = [failure.partition(":")[0] for failure in failures({"labelled": ours, "plain": expected})]
    assert {"loss", "gradient.lm_head.bias", "gradient.lm_head.dense.weight"} <= set(names)


@pytest.mark.parametrize("head", ["masked", "causal"])
@pytest.mark.parametrize("backend", NAMES)
def test_when_there_are_logits(backend, head):
    """As asked for; if not asked for, unless a model trains with labels."""
    asked = model(backend, head)
    inputs, labels = {"input_ids": IDS}, {"labels": IDS}
    trains = {"pt": {}, "tf": {"training": True}, "flax": {"train": True}}[backend]
    if backend == "flax":
        import jax

        trains["dropout_rng"] = jax.random.key(0)
    cases = [
        ({}, {}, None, True),
        (labels, {}, None, True),
        ({}, trains, None, True),
        (labels, trains, None, False),
        *((given, mode, wanted, wanted) for given in ({}, labels) for mode in ({}, trains) for wanted in (True, False)),
    ]
    with precision(backend, "float64"):
        for given, mode, wanted, expected in cases:
            if backend == "pt":
                asked.train(mode is trains)
            record = asked(**inputs, **given, **mode, output_logits=wanted)
            assert (record.logits is not None) == expected
            assert (record.loss is not None) == bool(given)
    with precision(backend, "float64"), pytest.raises(InputError, match="output_logits must be True or False"):
        asked(**inputs, output_logits=1)


@pytest.mark.parametrize("backend", NAMES)
def test_evaluation_without_logits(backend, monkeypatch):
    """The same loss, and if it is differentiated the same gradients."""
    chunked(backend, monkeypatch, 3 * 99)
    asked, inputs = model(backend, "masked"), {**INPUTS["right padding"], "labels": LABELS["few"]}
    if backend == "pt":
        import torch

        asked.eval()
        quiet = torch.no_grad()
    else:
        quiet = nullcontext()
    with precision(backend, "float64"), quiet:
        without, plain = (float(asked(**inputs, output_logits=wanted).loss) for wanted in (False, True))
    assert abs(without - plain) < TOLERANCE * plain
    if backend == "tf":
        _, ours = run(backend, asked, LABELS["few"], training=False, output_logits=False)
        _, expected = run(backend, asked, LABELS["few"], training=False, output_logits=True)
        assert failures({"labelled": ours, "plain": expected}) == []


@pytest.mark.parametrize("head", ["masked", "causal"])
@pytest.mark.parametrize("backend", NAMES)
def test_labels_out_of_range_are_refused(backend, head):
    labels = np.where(np.arange(33).reshape(3, 11) == 15, 99, IDS)
    for asked in (True, False):
        with precision(backend, "float64"), pytest.raises(InputError, match="labels must be .* below 99, .* got 99"):
            model(backend, head)(input_ids=IDS, labels=labels, output_logits=asked)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "mixed"])
@pytest.mark.parametrize("backend", NAMES)
def test_other_types(backend, kind, monkeypatch):
    """The types are those of the plain way, the numbers but for rounding."""
    chunked(backend, monkeypatch, 3 * 99)
    dtype = {"mixed": {"pt": "float32", "tf": "mixed_bfloat16", "flax": "bfloat16"}[backend]}.get(kind, kind)
    options = {"param_dtype": "float32"} if (backend, kind) == ("flax", "mixed") else {}
    asked, context = model(backend, "masked", dtype, **options), nullcontext()
    if (backend, kind) == ("pt", "mixed"):
        import torch

        context = torch.autocast("cpu", torch.bfloat16)
    with context:
        _, ours = run(backend, asked, LABELS["few"])
        _, expected = run(backend, asked, LABELS["few"], output_logits=True)
    assert ours["loss"].dtype == np.float32
    assert {name: array.dtype for name, array in ours.items()} == {name: a.dtype for name, a in expected.items()}
    rounding = 1e-5 if kind == "float32" else 0.05
    for name in (
        "loss",
        "gradient.lm_head.bias",
        "gradient.lm_head.dense.weight",
        "gradient.lm_head.layer_norm.weight",
    ):
        largest = np.abs(expected[name].astype(np.float64)).max()
        apart = np.abs(ours[name].astype(np.float64) - expected[name].astype(np.float64)).max()
        assert apart < rounding * largest, name


# ---------------------------------------------------------------------- what one framework has


def only(backend: str):
    return pytest.mark.skipif(backend not in NAMES, reason=f"{backend} is not installed")


@only("pt")
def test_pt_compiled(monkeypatch):
    """The labelled part is left to the interpreter; one that has the logits is compiled whole."""
    import torch

    chunked("pt", monkeypatch, 3 * 99)
    torch._dynamo.reset()
    asked = model("pt", "masked")
    compiled = torch.compile(asked.train(), backend="aot_eager")
    inputs = {name: torch.tensor(value) for name, value in INPUTS["right padding"].items()}
    for labels in ("few", "all", "one", "none"):
        _, expected = run("pt", asked, LABELS[labels], output_logits=True)
        asked.zero_grad()
        compiled(**inputs, labels=torch.tensor(LABELS[labels])).loss.backward()
        for name, parameter in asked.named_parameters():
            torch.testing.assert_close(parameter.grad, torch.tensor(expected[f"gradient.{name}"]), rtol=0, atol=1e-13)
    with pytest.raises(InputError, match="got 99"):
        compiled(**inputs, labels=torch.full((3, 11), 99))


@only("pt")
def test_pt_functional():
    """With other parameters than the model's own, under `grad`."""
    import torch

    asked, inputs = model("pt", "masked").train(), {"input_ids": torch.tensor(IDS), "labels": torch.tensor(IDS)}
    parameters = {name: value.detach() for name, value in asked.named_parameters()}

    def loss(parameters, **options):
        return torch.func.functional_call(asked, parameters, (), {**inputs, **options}).loss

    ours, expected = (torch.func.grad(partial(loss, output_logits=wanted))(parameters) for wanted in (None, True))
    for name in parameters:
        torch.testing.assert_close(ours[name], expected[name], rtol=0, atol=1e-13)


@only("pt")
def test_pt_frozen_parameters_get_no_gradient():
    asked = model("pt", "masked, untied")
    _, expected = run("pt", asked, LABELS["few"])
    asked.freeze("lm_head.decoder", "lm_head.bias")
    asked.train().zero_grad()
    asked(
        input_ids=INPUTS["right padding"]["input_ids"],
        attention_mask=INPUTS["right padding"]["attention_mask"],
        labels=LABELS["few"],
    ).loss.backward()
    asked.unfreeze("lm_head")
    assert asked.lm_head.decoder.weight.grad is asked.lm_head.bias.grad is None
    ours = asked.lm_head.dense.weight.grad.numpy()
    np.testing.assert_allclose(ours, expected["gradient.lm_head.dense.weight"], rtol=0, atol=1e-13)


@only("pt")
def test_pt_another_decoder_computes_itself():
    """One that was put in its place, as those are that add to a table without changing it; and one with hooks."""
    import copy

    import torch

    class Doubled(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.weight, self.bias = inner, inner.weight, inner.bias

        def forward(self, states):
            return 2 * self.inner(states)

    replaced, hooked = (copy.deepcopy(model("pt", "masked")).train() for _ in range(2))
    replaced.lm_head.decoder = Doubled(replaced.lm_head.decoder)
    hooked.lm_head.decoder.register_forward_hook(lambda module, given, logits: 2 * logits)
    for asked in (replaced, hooked):
        ours, plain = (asked(IDS, labels=LABELS["few"], output_logits=wanted).loss for wanted in (None, True))
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-13)


@only("pt")
@pytest.mark.parametrize("head", ["masked", "masked, untied"])
def test_pt_a_loss_can_be_gone_back_through_again(head):
    """What is kept for the second time is not what the first has given away; and the loss may be scaled."""
    asked = model("pt", head).train()
    asked.zero_grad()
    table = asked.get_output_embeddings().weight
    loss = asked(IDS, labels=LABELS["few"]).loss
    loss.backward(retain_graph=True)
    once = table.grad.clone()
    table.grad.zero_()
    loss.backward(retain_graph=True)
    np.testing.assert_array_equal(table.grad, once)
    loss.backward(retain_graph=True)
    np.testing.assert_array_equal(table.grad, 2 * once)
    (-4 * loss).backward()  # a power of two rounds nothing
    np.testing.assert_array_equal(table.grad, -2 * once)


@only("pt")
def test_pt_lookup_and_decoder_share_a_gradient(monkeypatch):
    """Where the table is one, and nobody sees the lookup or has changed it; the gradients are the same both ways."""
    import copy

    import torch

    from roberta_pln.pt import heads

    class Shifted(torch.nn.Embedding):
        def forward(self, ids):
            return super().forward((ids + 1) % 99)

    handed_on, original = [], heads.table_handed_on

    def counted():
        handed_on.append(True)
        return original()

    def changed(head: str, change) -> torch.nn.Module:
        asked = copy.deepcopy(model("pt", head)).train()
        change(asked.roberta_prelayernorm.embeddings)
        return asked

    def shift(of):
        of.word_embeddings.__class__ = Shifted

    def watch(of):
        of.word_embeddings.register_forward_hook(lambda module, given, rows: 2 * rows)

    def bound(of):
        of.word_embeddings.max_norm = 0.1

    def untouched(of):
        pass

    monkeypatch.setattr(heads, "table_handed_on", counted)
    cases = [("masked", untouched, True), ("causal", untouched, True), ("masked, untied", untouched, False)]
    for head, change, shares in [*cases, *(("masked", change, False) for change in (shift, watch, bound))]:
        asked = changed(head, change)
        handed_on.clear()
        _, ours = run("pt", asked, LABELS["few"])
        assert handed_on == [True] * shares, (head, change.__name__)
        _, expected = run("pt", asked, LABELS["few"], output_logits=True)
        assert failures({"labelled": ours, "plain": expected}) == [], (head, change.__name__)
    handed_on.clear()
    model("pt", "masked").eval()(IDS, labels=IDS)
    assert handed_on == []


@only("pt")
@pytest.mark.parametrize("padding_idx", [None, 1])
def test_pt_gradients_of_a_shared_lookup(padding_idx):
    """Against differences, also the second ones; with rows, the table, or both made use of."""
    import torch

    from roberta_pln.pt.embeddings import LookUp

    ids = torch.tensor([[0, 2, 2], [3, 0, 1]])
    table = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)

    def rows(table):
        found = LookUp.apply(table, ids, padding_idx)[0]
        return found if padding_idx is None else found[ids != padding_idx]

    def both(table):
        found, handed_on = LookUp.apply(table, ids, padding_idx)
        return (handed_on.sin() @ handed_on.T).sum() * found[ids != padding_idx].square().sum()

    for function in (rows, both, lambda table: LookUp.apply(table, ids, padding_idx)[1].square()):
        assert torch.autograd.gradcheck(function, table)
        assert torch.autograd.gradgradcheck(function, table)
    LookUp.apply(table, ids, padding_idx)[0].sum().backward()
    assert (table.grad[1] == (1 if padding_idx is None else 0)).all()


@pytest.mark.parametrize("backend", NAMES)
def test_second_derivatives_need_the_logits(backend):
    """They are refused, not wrong."""
    asked, inputs = model(backend, "masked"), {"input_ids": IDS, "labels": IDS}
    for wanted in (False, True):
        refused = pytest.raises((NotImplementedError, ValueError), match="second derivative|Reverse-mode")
        with precision(backend, "float64"), nullcontext() if wanted else refused:
            assert SECOND[backend](asked, {**inputs, "output_logits": wanted}) > 0


def second_pt(asked, inputs):
    import torch

    weight = asked.lm_head.dense.weight
    (slope,) = torch.autograd.grad(asked(**inputs).loss, weight, create_graph=True)
    return torch.autograd.grad(slope.square().sum(), weight)[0].abs().max()


def second_tf(asked, inputs):
    import tensorflow as tf

    weight = asked.lm_head.dense.kernel.value
    with tf.GradientTape() as outer:
        with tf.GradientTape() as inner:
            loss = asked(**inputs, training=True).loss
        square = tf.reduce_sum(tf.square(inner.gradient(loss, weight)))
    return tf.reduce_max(tf.abs(outer.gradient(square, weight)))


def second_flax(asked, inputs):
    import jax
    import jax.numpy as jnp

    def loss(params):
        return asked(**inputs, params=params).loss

    def square(params):
        return jnp.square(jax.grad(loss)(params)["lm_head"]["dense"]["kernel"]).sum()

    return jnp.abs(jax.grad(square)(asked.params)["lm_head"]["dense"]["kernel"]).max()


SECOND = {"pt": second_pt, "tf": second_tf, "flax": second_flax}


@only("tf")
@pytest.mark.parametrize("xla", [False, True], ids=["plain", "xla"])
def test_tf_graphs(xla, monkeypatch):
    """One trace for every batch and length."""
    import tensorflow as tf

    chunked("tf", monkeypatch, 3 * 99)
    asked = model("tf", "masked")
    variables = [variable.value for variable in asked.trainable_weights]

    def step(ids, labels, **options):
        with tf.GradientTape() as tape:
            loss = asked(ids, labels=labels, training=True, **options).loss
        return loss, [tf.convert_to_tensor(gradient) for gradient in tape.gradient(loss, variables)]

    spec = tf.TensorSpec((None, None), tf.int64)
    compiled = tf.function(step, input_signature=(spec, spec), jit_compile=xla)
    for labels in (LABELS["few"], LABELS["all"][:1, :2], LABELS["one"][:2]):
        ids = tf.constant(IDS[: labels.shape[0], : labels.shape[1]])
        (loss, gradients), (plain, expected) = (
            compiled(ids, tf.constant(labels)),
            step(ids, tf.constant(labels), output_logits=True),
        )
        np.testing.assert_allclose(loss, plain, rtol=0, atol=1e-13)
        for ours, theirs in zip(gradients, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-13)
    bad = tf.constant(np.where(np.arange(33).reshape(3, 11) == 15, 99, IDS))
    assert np.isnan(compiled(tf.constant(IDS), bad)[0])


@only("tf")
def test_tf_fit_has_no_logits_unless_something_reads_them(monkeypatch):
    import keras

    from roberta_pln.tf import RobertaPreLayerNormForMaskedLM

    def fit(data, **options):
        fitted = RobertaPreLayerNormForMaskedLM(tiny_config(num_hidden_layers=1), seed=0)
        fitted.compile(keras.optimizers.SGD(1.0), run_eagerly=True, **options)
        return fitted.fit(*data, verbose=0).history["loss"]

    forms = [({"input_ids": IDS, "labels": IDS},), (IDS, IDS), ((IDS, np.ones_like(IDS)), {"labels": IDS})]
    expected = fit(forms[0], metrics=["accuracy"])
    monkeypatch.setattr(RobertaPreLayerNormForMaskedLM, "own_loss", None)  # which takes logits
    for form in forms:
        assert fit(form) == pytest.approx(expected, rel=1e-6)  # float32
    with pytest.raises(TypeError):
        fit(forms[0], metrics=["accuracy"])


@only("flax")
@pytest.mark.parametrize("head", ["masked", "causal"])
def test_flax_on_several_devices_keeps_rows_where_they_are(head, monkeypatch):
    """With several devices, positions change places within their row only."""
    import jax

    _, expected = run("flax", model("flax", head), LABELS["few"], output_logits=True)
    for chunk in (3 * 99, 7 * 99):
        chunked("flax", monkeypatch, chunk)
        monkeypatch.setattr(jax, "device_count", lambda: 2)
        compiled_flax.cache_clear()
        _, ours = run("flax", model("flax", head), LABELS["few"])
        compiled_flax.cache_clear()
        assert failures({"labelled": ours, "plain": expected}) == []


@only("flax")
@pytest.mark.parametrize("head", HEADS)
def test_flax_parameters_are_made_without_logits(head):
    import jax
    from flax.traverse_util import flatten_dict

    with precision("flax", "float64"):
        module, key = model("flax", head).module, jax.random.key(0)
        made = module.init({"params": key, "dropout": key}, IDS, labels=IDS, deterministic=False)["params"]
        assert flatten_dict(made).keys() == flatten_dict(model("flax", head).params).keys()
