"""Every activation: the same numbers in every backend and in transformers, parameters and functions among them.

The tolerances: a value takes a few roundings of 1e-16 of itself; those of whole models are as in `test_equality`.
"""

import copy
import importlib
import tempfile
from pathlib import Path

import numpy as np
import pytest

from roberta_pln import ConfigError, RobertaPreLayerNormConfig, backends, checkpoint, numerics, schema
from tests.contract import FORMATS, INPUTS, load, precision, random_checkpoint, random_tensors, tiny_config, with_labels
from tests.cross.test_equality import built, failures, run

NAMES = backends.installed()
pytestmark = pytest.mark.skipif(len(NAMES) < 2, reason="a comparison needs two backends")
INPUT = with_labels(INPUTS["right padding"])
SMALL = dict(num_hidden_layers=1, intermediate_size=36)  # even, for glu
LEARNED = ("prelu", "xielu")

POINTS = np.concatenate(
    [np.linspace(-12, 12, 97), [6, -6, 10, -10, 1e-3, -1e-3, 1e-9, -1e-9, 40, -40, 1e3, -1e3, 1e6, -1e6, 0.5]]
).reshape(2, -1)
"""Kinks (-10, 0, 6, 10), the places where functions are nearly straight, and where exp overflows."""


def value_and_derivative(backend: str, name: str, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of a layer's activation with its first parameters."""
    with precision(backend, "float64"):
        return {"pt": in_pytorch, "tf": in_tensorflow, "flax": in_flax}[backend](name, points)


def in_pytorch(name, points):
    import torch

    from roberta_pln.pt.activations import activation

    function, x = activation(tiny_config(**SMALL, hidden_act=name)), torch.tensor(points, requires_grad=True)
    if name in LEARNED:
        for leaf in schema.LEAVES[name]:
            setattr(function, leaf.name, torch.nn.Parameter(torch.tensor([leaf.initializer], dtype=torch.float64)))
    value = function(x)
    value.sum().backward()
    return value.detach().numpy(), x.grad.numpy()


def in_tensorflow(name, points):
    import keras
    import tensorflow as tf

    from roberta_pln.tf.activations import activation
    from roberta_pln.tf.layers import Shared

    shared = Shared(keras.dtype_policies.get("float64"), keras.random.SeedGenerator(0))
    function, x = activation(tiny_config(**SMALL, hidden_act=name), shared), tf.constant(points)
    if name in LEARNED:
        function.set_weights([np.array([leaf.initializer]) for leaf in schema.LEAVES[name]])
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = function(x)
    return value.numpy(), tape.gradient(value, x).numpy()


def in_flax(name, points):
    import jax

    from roberta_pln.flax.activations import activation

    function = activation(tiny_config(**SMALL, hidden_act=name), np.float64)
    if name in LEARNED:
        function = function.bind(function.init(jax.random.key(0), points))
    value, pull = jax.vjp(function, jax.numpy.asarray(points))
    return np.asarray(value), np.asarray(pull(np.ones(value.shape))[0])


def agree(ours, theirs, tolerance=1e-13):
    for mine, their in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, their, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", numerics.ACTIVATIONS)
def test_functions_are_the_same(name):
    first, *others = (value_and_derivative(backend, name, POINTS) for backend in NAMES)
    assert all(np.isfinite(array).all() for array in first)
    for other in others:
        agree(first, other)


@pytest.mark.parametrize("wrong", ["gelu_new", "quick_gelu"])
def test_another_function_is_seen(wrong):
    """The control: the approximations of gelu are no gelu."""
    with pytest.raises(AssertionError):
        agree(value_and_derivative(NAMES[0], "gelu", POINTS), value_and_derivative(NAMES[-1], wrong, POINTS))


# ---------------------------------------------------------------- models


def bent(x):
    """An activation that has no name, for tensors of every framework."""
    return 0.5 * x + 0.1 * x * x


@pytest.mark.parametrize("act", ["glu", *LEARNED])
def test_models_are_the_same(act):
    answers = {name: run(name, built(name, {**SMALL, "hidden_act": act}, "ForMaskedLM"), INPUT) for name in NAMES}
    parameters = [key for key in answers[NAMES[0]] if "intermediate_act_fn" in key]
    assert len(parameters) == {"glu": 0, "prelu": 1, "xielu": 2}[act]
    assert all(np.abs(answers[NAMES[0]][key]).max() > 1e-6 for key in parameters)
    assert failures(answers) == []


def with_function(backend: str, function):
    """A model of always the same weights, whose activation is a function."""
    with tempfile.TemporaryDirectory() as folder, precision(backend, "float64"):
        random_checkpoint(Path(folder), tiny_config(**SMALL), "ForMaskedLM")
        return load(backend, Path(folder), "ForMaskedLM", hidden_act=function)


def test_models_with_a_function_are_the_same():
    answers = {name: run(name, with_function(name, bent), INPUT) for name in NAMES}
    assert failures(answers) == []
    other = run(NAMES[0], with_function(NAMES[0], lambda x: x), INPUT)
    assert failures({NAMES[0]: answers[NAMES[0]], NAMES[1]: other})  # the function is not ignored


@pytest.mark.parametrize("backend", NAMES)
def test_a_model_with_a_function_cannot_be_saved(backend, tmp_path):
    model = load(backend, random_checkpoint(tmp_path, tiny_config(), "Model"), "Model", "float32", hidden_act=bent)
    assert model.config.hidden_act is bent
    folder = tmp_path / "copy"
    with pytest.raises(ConfigError, match="must be a name for the config to be written, got <function bent"):
        model.save_pretrained(folder)
    assert not folder.exists()
    model.config.hidden_act = "linear"
    model.save_pretrained(folder)
    assert RobertaPreLayerNormConfig.from_pretrained(folder).hidden_act == "linear"


def test_keras_cannot_describe_a_function():
    tf = pytest.importorskip("roberta_pln.tf")
    model = tf.RobertaPreLayerNormModel(tiny_config(**SMALL, hidden_act=bent))
    with pytest.raises(ConfigError, match="must be a name for the config to be written"):
        model.get_config()


@pytest.mark.parametrize("backend", NAMES)
def test_a_layer_with_weights_is_refused(backend):
    layers = importlib.import_module({"pt": "torch.nn", "tf": "keras.layers", "flax": "flax.linen"}[backend])
    config = tiny_config(**SMALL, hidden_act=layers.PReLU())
    with pytest.raises(ConfigError, match="(?s)a function without weights of its own.* are 'prelu' and 'xielu'"):
        backends.BACKENDS[backend].model_class("Model")(config)


def test_a_layer_without_weights_is_a_function():
    nn = pytest.importorskip("torch").nn
    layer, function = (run("pt", with_function("pt", act), INPUT) for act in (nn.SiLU(), nn.functional.silu))
    assert all(np.array_equal(layer[key], function[key]) for key in function)


# ---------------------------------------------------------------- on disk


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("act", LEARNED)
def test_parameters_survive_every_format(act, format, tmp_path):
    config = tiny_config(**SMALL, hidden_act=act)
    tensors = random_tensors(config, "ForMaskedLM")
    checkpoint.save(tensors, tmp_path, config, "ForMaskedLM", format)
    opened = checkpoint.open(tmp_path)
    assert not opened.foreign
    assert opened.keys() == tensors.keys()
    assert all(np.array_equal(opened[name], tensors[name]) for name in tensors)


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


@pytest.mark.parametrize("format", ["safetensors", "torch"])
@pytest.mark.parametrize("act", LEARNED)
def test_transformers_loads_what_we_save(act, format, transformers, tmp_path):
    config = tiny_config(**SMALL, hidden_act=act)
    tensors = random_tensors(config, "ForMaskedLM")
    checkpoint.save(tensors, tmp_path, config, "ForMaskedLM", format)
    model, info = transformers.RobertaPreLayerNormForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    activation = model.roberta_prelayernorm.encoder.layer[0].intermediate.intermediate_act_fn
    for name, value in activation.state_dict().items():
        constant = schema.XIELU_CONSTANTS.get(name)
        own = tensors.get(f"{schema.LAYER.format(i=0)}.intermediate.intermediate_act_fn.{name}", constant)
        np.testing.assert_allclose(value.float(), own, rtol=2**-8)  # it keeps those of xielu in bfloat16


@pytest.mark.parametrize("act", LEARNED)
def test_we_load_what_transformers_saves(act, transformers, tmp_path, recwarn):
    config = transformers.RobertaPreLayerNormConfig(**{**tiny_config(**SMALL).to_dict(), "hidden_act": act})
    theirs = transformers.RobertaPreLayerNormForMaskedLM(config)
    theirs.save_pretrained(tmp_path)
    opened = checkpoint.open(tmp_path)
    assert not opened.foreign
    assert {name.rpartition(".")[2] for name in opened.dropped} == ({"beta", "eps"} if act == "xielu" else set())
    state = theirs.state_dict()
    for name in opened:
        np.testing.assert_array_equal(opened[name].astype(np.float32), state[name].float())
    for backend in NAMES:
        load(backend, tmp_path, "ForMaskedLM", "float32")
    assert not [warning for warning in recwarn if "newly initialised" in str(warning.message)]


# ---------------------------------------------------------------- transformers' numbers


PEER_TOLERANCES = {name: 1e-13 for name in numerics.ACTIVATIONS if name != "glu"} | {"gelu_fast": 1e-11}
"""A hundred roundings of 1e-16 of numbers near 1; its gelu_fast has sqrt(2/pi) to ten digits, which is 4e-12 off.

`glu` is in its TensorFlow class alone, which fails at the first call.
"""


@pytest.mark.parametrize(("name", "tolerance"), PEER_TOLERANCES.items())
def test_transformers_computes_the_same(name, tolerance, transformers, tmp_path):
    """In float64, with gradients."""
    import torch

    config = tiny_config(**SMALL, hidden_act=name)
    tensors = random_tensors(config, "ForMaskedLM")
    checkpoint.save(tensors, tmp_path, config, "ForMaskedLM")
    peer = transformers.RobertaPreLayerNormForMaskedLM.from_pretrained(tmp_path, dtype=torch.float64).double()
    # It keeps the parameters of xielu in bfloat16, whatever the type of the model and of the file is.
    for key, parameter in peer.named_parameters():
        parameter.data = torch.from_numpy(tensors[key].astype(np.float64))
    peer.tie_weights()
    arguments = {key: torch.as_tensor(value) for key, value in INPUT.items()}
    record = peer(**arguments)
    record.loss.backward()
    theirs = {"loss": record.loss, "logits": record.logits}
    theirs |= {f"gradient.{key}": parameter.grad for key, parameter in peer.named_parameters()}
    ours = run("pt", load("pt", tmp_path, "ForMaskedLM"), INPUT)
    assert theirs.keys() | {"hidden_states.0", "hidden_states.1"} == ours.keys()
    for key, value in theirs.items():
        np.testing.assert_allclose(ours[key], value.detach(), rtol=0, atol=tolerance, err_msg=key)


def test_functions_are_those_of_transformers(transformers):
    """In float64 on all points. Between -1e-6 and 0 its xielu is another function, for the sake of its own kernel."""
    import torch

    for name, tolerance in PEER_TOLERANCES.items():
        points = POINTS[(POINTS > 0) | (POINTS < -1e-6)] if name == "xielu" else POINTS
        function, x = transformers.activations.ACT2FN[name], torch.tensor(points, requires_grad=True)
        if name == "xielu":
            function = type(function)(dtype=torch.float64)
        value = (function.double() if isinstance(function, torch.nn.Module) else function)(x)
        value.sum().backward()
        agree(value_and_derivative("pt", name, points), (value.detach(), x.grad), tolerance)


# ---------------------------------------------------------------- configs


def test_a_config_keeps_a_function():
    config = tiny_config(hidden_act=bent)
    assert config.hidden_act is bent
    assert copy.deepcopy(config) == config == config.replace()
    assert config.replace(num_labels=3).hidden_act is bent
    assert config.replace(hidden_act="silu").to_dict()["hidden_act"] == "silu"


@pytest.mark.parametrize("method", ["to_dict", "to_json_string", "save_pretrained"])
def test_a_config_with_a_function_is_not_written(method, tmp_path):
    config, folder = tiny_config(hidden_act=bent), tmp_path / "folder"
    arguments = (folder,) if method == "save_pretrained" else ()
    with pytest.raises(ConfigError, match=r"got <function bent.*: set it to the one of gelu, .*, xielu that computes"):
        getattr(config, method)(*arguments)
    assert not (folder / "config.json").exists()


@pytest.mark.parametrize("value", ["gelut", None, 3, int, ["gelu"]])
def test_what_is_no_activation(value):
    with pytest.raises(ConfigError, match=r"hidden_act must be one of gelu, .*, xielu, or a function .*, got "):
        tiny_config(hidden_act=value)


def test_glu_halves():
    with pytest.raises(ConfigError, match="intermediate_size must be even for hidden_act 'glu', .* got 37"):
        tiny_config(hidden_act="glu")
    shapes = schema.expand(tiny_config(**SMALL, hidden_act="glu"), "Model")
    assert shapes[f"{schema.LAYER.format(i=0)}.output.dense.weight"].shape == (32, 18)
