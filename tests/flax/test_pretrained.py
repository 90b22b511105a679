"""Loading and saving as far as it is particular to Flax; `tests/checkpoint` has the formats."""

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("flax")

import jax.numpy as jnp

from roberta_pln import checkpoint
from roberta_pln.flax import RobertaPreLayerNormForMaskedLM, RobertaPreLayerNormModel
from tests.contract import FORMATS, random_checkpoint, random_ids, tiny_config

IDS = random_ids()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("checkpoint"), tiny_config(), "ForMaskedLM")


def dtypes(params):
    return {value.dtype.name for value in jax.tree.leaves(params)}


@pytest.mark.parametrize("options", [dict(), dict(safe_serialization=False), *(dict(format=f) for f in FORMATS)])
def test_round_trip(folder, tmp_path, options):
    model = RobertaPreLayerNormForMaskedLM.from_pretrained(folder)
    model.save_pretrained(tmp_path, **options)
    wanted = "msgpack" if "safe_serialization" in options else options.get("format", "safetensors")
    assert (tmp_path / checkpoint.FILES[wanted]).exists()
    again = RobertaPreLayerNormForMaskedLM.from_pretrained(tmp_path)
    assert again.config.replace(dtype=None) == model.config.replace(dtype=None)
    jax.tree.map(np.testing.assert_array_equal, model.params, again.params)


def test_tensors_arrive_in_their_places(folder):
    stored, model = checkpoint.open(folder), RobertaPreLayerNormForMaskedLM.from_pretrained(folder)
    base = model.params["roberta_prelayernorm"]
    name = "roberta_prelayernorm.encoder.layer.1.intermediate.dense.weight"
    np.testing.assert_array_equal(base["encoder"]["layer"]["1"]["intermediate"]["dense"]["kernel"], stored[name].T)
    np.testing.assert_array_equal(base["LayerNorm"]["scale"], stored["roberta_prelayernorm.LayerNorm.weight"])


def test_params_beside_the_model(folder, tmp_path):
    model, params = RobertaPreLayerNormForMaskedLM.from_pretrained(folder, _do_init=False)
    with pytest.raises(ValueError, match="has no parameters"):
        model.params  # noqa: B018
    whole, info = RobertaPreLayerNormForMaskedLM.from_pretrained(folder, output_loading_info=True)
    np.testing.assert_array_equal(model(IDS, params=params).logits, whole(IDS).logits)
    assert info == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
    model.save_pretrained(tmp_path, params)
    saved = RobertaPreLayerNormForMaskedLM.from_pretrained(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, saved.params, params)


@pytest.mark.parametrize(
    ("options", "computed", "stored"),
    [
        (dict(), "float32", "float32"),
        (dict(dtype="auto"), "float32", "float32"),
        (dict(dtype=jnp.bfloat16), "bfloat16", "bfloat16"),
        (dict(dtype="bfloat16", param_dtype="float32"), "bfloat16", "float32"),
        (dict(param_dtype="float16"), "float32", "float16"),
    ],
)
def test_types(folder, tmp_path, options, computed, stored):
    model = RobertaPreLayerNormForMaskedLM.from_pretrained(folder, **options)
    assert (jax.eval_shape(model, IDS).logits.dtype, dtypes(model.params)) == (computed, {stored})
    if stored == "float32":  # not by way of the type of the computation
        exact = RobertaPreLayerNormForMaskedLM.from_pretrained(folder).params
        jax.tree.map(np.testing.assert_array_equal, model.params, exact)
    model.save_pretrained(tmp_path)
    assert checkpoint.open(tmp_path).config.dtype == stored


def test_float64(folder):
    with pytest.raises(ValueError, match="jax_enable_x64"):
        RobertaPreLayerNormForMaskedLM.from_pretrained(folder, dtype="float64")
    with jax.enable_x64(True):
        model = RobertaPreLayerNormForMaskedLM.from_pretrained(folder, dtype="float64")
        assert (jax.eval_shape(model, IDS).logits.dtype, dtypes(model.params)) == ("float64", {"float64"})


def test_what_is_missing_is_drawn_from_the_seed(folder):
    with pytest.warns(UserWarning, match=r"newly initialised: .*pooler\.dense\.weight"):
        first, again, other = (RobertaPreLayerNormModel.from_pretrained(folder, seed=seed) for seed in (3, 3, 4))
    constructed = RobertaPreLayerNormModel(tiny_config(), seed=3)
    kernels = [model.params["pooler"]["dense"]["kernel"] for model in (first, again, constructed, other)]
    for kernel in kernels[:3]:
        np.testing.assert_array_equal(kernels[0], kernel)
    assert np.abs(kernels[0] - kernels[3]).max() > 0
    assert "pooler" not in RobertaPreLayerNormModel.from_pretrained(folder, add_pooling_layer=False).params
