"""Parameters and batch shared out over a mesh of eight devices: the same numbers as on one.

The devices are eight of XLA's on one processor, which has to be told of them before it starts: so the numbers come
from a process of their own.
"""

import json
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("flax")
pytest.importorskip("optax")

from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from roberta_pln.flax import RobertaPreLayerNormForMaskedLM, RobertaPreLayerNormModel
from tests.contract import random_checkpoint, random_ids, tiny_config, with_labels

RULES = {"attention_size": "model", "intermediate_size": "model", "vocab_size": "model"}
SIZES = dict(vocab_size=100, intermediate_size=36, num_hidden_layers=1)
AUTO = (AxisType.Auto, AxisType.Auto)
MESH = AbstractMesh((2, 4), ("data", "model"), axis_types=AUTO)
WIDE = AbstractMesh((1, 16), ("data", "model"), axis_types=AUTO)
EXPLICIT = AbstractMesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Explicit))


def run(folder: str) -> dict[str, object]:
    """One step of training on one device and on eight: differences, and where the results are."""
    import optax
    from jax.sharding import NamedSharding

    jax.config.update("jax_enable_x64", True)
    model = RobertaPreLayerNormForMaskedLM.from_pretrained(folder, dtype="float64")
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=AUTO)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), model.partition_specs(mesh, RULES))
    batch = with_labels({"input_ids": random_ids(8)})
    optimizer = optax.adam(1e-3)

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles in half the time
    def step(params, state, batch):
        def loss(params):
            record = model(**batch, params=params)
            return record.loss, record.logits

        (value, logits), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradient, state, params)
        return value, logits, gradient, optax.apply_updates(params, updates)

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def labelled(params, batch):
        return jax.value_and_grad(lambda params: model(**batch, params=params, output_logits=False).loss)(params)

    one = step(model.params, optimizer.init(model.params), batch)
    params = jax.device_put(model.params, shardings)
    placed = {name: jax.device_put(value, NamedSharding(mesh, P("data"))) for name, value in batch.items()}
    many = step(params, optimizer.init(params), placed)
    eager = model(input_ids=placed["input_ids"], params=params).logits
    loss, gradient = labelled(params, placed)
    one, many = (*one, one[0], one[2]), (*many, loss, gradient)
    differences = jax.tree.map(lambda x, y: float(np.abs(x - y).max() / max(1e-3, np.abs(x).max())), one, many)
    trees = {"parameters": params, "gradients": many[2], "updated": many[3]}
    return {
        "devices": jax.device_count(),
        "differences": [max(jax.tree.leaves(tree)) for tree in differences] + [float(np.abs(eager - one[1]).max())],
        "logits": list(many[1].sharding.shard_shape(many[1].shape)),
        "elsewhere": [
            f"{kind} {jax.tree_util.keystr(path)}"
            for kind, tree in trees.items()
            for (path, x), wanted in zip(jax.tree.leaves_with_path(tree), jax.tree.leaves(shardings), strict=True)
            if not x.sharding.is_equivalent_to(wanted, x.ndim)
        ],
        "held": sum(x.addressable_shards[0].data.size for x in jax.tree.leaves(params)),
        "whole": model.num_parameters(),
    }


def test_eight_devices_compute_what_one_computes(tmp_path):
    """In float64: a rounding is 1e-16 of a number, and gradients pass through some thousand of them."""
    folder = random_checkpoint(tmp_path, tiny_config(**SIZES), "ForMaskedLM")
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.flax.test_sharding", str(folder)]
    done = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    loss, logits, gradient, updated, labelled_loss, labelled_gradient, eager = found["differences"]
    assert max(loss, logits, updated, labelled_loss, eager) < 1e-12
    assert max(gradient, labelled_gradient) < 1e-11
    assert (found["devices"], found["logits"], found["elsewhere"]) == (8, [4, 11, 25], [])
    assert found["held"] < 0.6 * found["whole"]


def test_specs_are_in_the_form_of_the_parameters():
    model = RobertaPreLayerNormForMaskedLM(tiny_config(**SIZES), _do_init=False)
    specs = model.partition_specs(MESH, RULES)
    layer = specs["roberta_prelayernorm"]["encoder"]["layer"]["0"]
    assert jax.tree.structure(specs) == jax.tree.structure(model.params_shape_tree)
    assert layer["attention"]["self"]["query"] == {"kernel": P(None, "model"), "bias": P("model")}
    assert layer["output"]["dense"] == {"kernel": P("model", None), "bias": P(None)}
    assert specs["lm_head"]["bias"] == P("model")
    everything = model.partition_specs(MESH, {"hidden_size": ("data", "model"), "intermediate_size": "model"})
    assert everything["lm_head"]["dense"] == {"kernel": P(None, ("data", "model")), "bias": P(("data", "model"))}


@pytest.mark.parametrize(
    ("sizes", "mesh", "rules", "message"),
    [
        ({}, MESH, {"vocabulary": "model"}, "no parameter has an axis vocabulary; there are .*vocab_size"),
        ({}, MESH, {"vocab_size": "models"}, "the mesh has no axis models; it has data, model"),
        (
            {"vocab_size": 99},
            MESH,
            RULES,
            r"(?s)'model': 4.*word_embeddings.weight: vocab_size is 99, and model does not",
        ),
        ({"pruned_heads": {0: [1]}}, WIDE, {"attention_size": "model"}, "query.weight: attention_size is 24"),
        ({}, EXPLICIT, RULES, "explicit axes"),
    ],
)
def test_rules_that_do_not_fit(sizes, mesh, rules, message):
    model = RobertaPreLayerNormModel(tiny_config(**{**SIZES, **sizes}), _do_init=False)
    with pytest.raises(ValueError, match=message):
        model.partition_specs(mesh, rules)


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1])))
