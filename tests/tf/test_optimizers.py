"""AdamW against PyTorch's, and as an optimizer of Keras."""

import keras
import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

from roberta_pln.tf import AdamW

RNG = np.random.default_rng(0)
START = RNG.standard_normal((7, 3))
GRADIENTS = [RNG.standard_normal((7, 3)) * 10.0 ** RNG.integers(-9, 1, (7, 3)) for _ in range(10)]
EPS = {"float64": 2**-53, "float32": 2**-24, "bfloat16": 2**-8}

OPTIONS = {
    "defaults": ({}, {}),
    "every number": (
        dict(learning_rate=0.1, weight_decay=0.3, beta_1=0.8, beta_2=0.99, epsilon=1e-4),
        dict(lr=0.1, weight_decay=0.3, betas=(0.8, 0.99), eps=1e-4),
    ),
    "amsgrad": (dict(amsgrad=True), dict(amsgrad=True)),
    "no decay": (dict(weight_decay=0.0), dict(weight_decay=0.0)),
}


def moved(optimizer, dtype: str, jit_compile: bool = False, gradients=GRADIENTS) -> np.ndarray:
    """A variable after ten steps."""
    variable = keras.Variable(START, dtype=dtype, name="kernel")
    optimizer.build([variable])
    step = tf.function(lambda gradient: optimizer.apply([gradient], [variable]), jit_compile=jit_compile)
    for gradient in gradients:
        step(tf.cast(gradient, dtype) if isinstance(gradient, np.ndarray) else gradient)
    return tf.cast(variable, "float64").numpy()


def test_a_variable_by_itself_moves_as_with_others():
    """Where Keras does not ask for what updates have in common, each computes it."""
    variable, optimizer = keras.Variable(START, dtype="float64", name="kernel"), AdamW(weight_decay=0.3)
    optimizer.build([variable])
    for gradient in GRADIENTS:
        optimizer.update_step(tf.constant(gradient), variable, tf.constant(1e-3, tf.float64))
        optimizer.iterations.assign_add(1)
    np.testing.assert_array_equal(variable.numpy(), moved(AdamW(weight_decay=0.3), "float64"))


def moved_by_torch(dtype: str, **options) -> np.ndarray:
    torch = pytest.importorskip("torch")
    parameter = torch.nn.Parameter(torch.tensor(START, dtype=getattr(torch, dtype)))
    optimizer = torch.optim.AdamW([parameter], **options)
    for gradient in GRADIENTS:
        parameter.grad = torch.tensor(gradient, dtype=parameter.dtype)
        optimizer.step()
    return parameter.detach().double().numpy()


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("name", OPTIONS)
def test_the_steps_of_torch(name, dtype):
    ours, theirs = OPTIONS[name]
    expected = moved_by_torch(dtype, **theirs)
    # a rounding of a number up to 4 in each of the ten steps, of which bfloat16 makes more on the way
    tolerance = 10 * 4 * EPS[dtype]
    np.testing.assert_allclose(moved(AdamW(**ours), dtype), expected, rtol=0, atol=tolerance)
    if dtype != "bfloat16":
        np.testing.assert_allclose(moved(AdamW(**ours), dtype, jit_compile=True), expected, rtol=0, atol=tolerance)
    options = {"learning_rate": 1e-3, "weight_decay": 0.01, "epsilon": 1e-8, **ours}
    control = moved(keras.optimizers.AdamW(**options), dtype)
    assert np.abs(control - expected).max() > (10 * tolerance if dtype != "bfloat16" else 0)


def test_in_bfloat16_it_moves_at_all():
    gradients = [np.ones_like(START)] * 10
    start = moved(AdamW(0.0), "bfloat16", gradients=gradients)
    assert np.abs(moved(AdamW(0.1), "bfloat16", gradients=gradients) - start).min() > 0.9
    still = keras.optimizers.AdamW(0.1, weight_decay=0.0)
    np.testing.assert_array_equal(moved(still, "bfloat16", gradients=gradients), start)  # Keras' own does not


def test_numbers_keep_their_digits():
    """Keras has them in float32."""
    optimizer = AdamW(3e-4, weight_decay=0.1)
    assert optimizer.learning_rate.dtype == "float64"
    assert float(optimizer.learning_rate) == optimizer.get_config()["learning_rate"] == 3e-4
    optimizer.learning_rate = 1e-5
    assert float(optimizer.learning_rate) == 1e-5
    assert float(keras.optimizers.AdamW(3e-4).learning_rate) != 3e-4


def test_config():
    config = {**AdamW(3e-4, 0.1, 0.8, 0.99, 1e-4, global_clipnorm=1.0).get_config(), "name": "mine"}
    optimizer = keras.optimizers.deserialize(keras.optimizers.serialize(AdamW.from_config(config)))
    assert type(optimizer) is AdamW
    assert optimizer.get_config() == config


@pytest.mark.parametrize(
    "rate",
    [lambda: 0.25, keras.optimizers.schedules.PiecewiseConstantDecay([100], [0.25, 1.0])],
    ids=["a function", "a schedule"],
)
def test_rates_that_are_no_numbers(rate):
    np.testing.assert_array_equal(moved(AdamW(rate), "float64"), moved(AdamW(0.25), "float64"))
    optimizer = AdamW(0.5)
    optimizer.learning_rate = rate  # Keras allows that until it is built
    np.testing.assert_array_equal(moved(optimizer, "float64"), moved(AdamW(0.25), "float64"))


@pytest.mark.parametrize("options", [{}, {"clipnorm": 0.5}, {"global_clipnorm": 0.5}, {"clipvalue": 0.1}], ids=str)
def test_slices_of_a_table_are_its_dense_gradient(options):
    """Rows that a batch has twice count once, with the sum of their gradients."""
    values = np.array([[1.0, 2, 3], [4, 5, 6], [-1, -2, -3.5]])
    dense = np.zeros_like(START)
    np.add.at(dense, [2, 5, 2], values)
    slices = tf.IndexedSlices(tf.constant(values), tf.constant([2, 5, 2]), tf.constant(START.shape))
    expected = moved(AdamW(**options), "float64", gradients=[dense] * 3)
    np.testing.assert_allclose(moved(AdamW(**options), "float64", gradients=[slices] * 3), expected, rtol=1e-15)


def test_variables_without_decay():
    variables = [keras.Variable(np.ones(3), dtype="float64", name=name) for name in ("kernel", "bias", "gamma")]
    optimizer = AdamW(0.5, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_list=variables[2:], var_names=["bias"])
    optimizer.apply([tf.zeros(3, tf.float64)] * 3, variables)
    assert [variable.numpy()[0] for variable in variables] == [0.75, 1, 1]


def test_gradients_that_are_not_there():
    variables = [keras.Variable(np.ones(3), name=name) for name in ("used", "unused")]
    with pytest.warns(UserWarning, match="Gradients do not exist for variables.*unused"):
        AdamW(0.5).apply([tf.ones(3), None], variables)
    assert variables[0].numpy()[0] < variables[1].numpy()[0] == 1


def test_accumulated_gradients():
    """Two halves of a batch in two calls are one step on their mean."""
    halves = [half for gradient in GRADIENTS for half in (gradient * 0.5, gradient * 1.5)]
    accumulated = moved(AdamW(gradient_accumulation_steps=2), "float64", gradients=halves)
    np.testing.assert_allclose(accumulated, moved(AdamW(), "float64"), rtol=1e-14)
