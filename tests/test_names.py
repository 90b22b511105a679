"""Every name of every library, in both directions."""

import re

import pytest

from roberta_pln import names, schema
from tests.contract import tiny_config

CONFIG = tiny_config(
    is_decoder=True, add_cross_attention=True, position_embedding_type="relative_key", tie_word_embeddings=False
)
R = schema.PREFIX
LAYER = f"{R}.encoder.layer.1"
TABLES = f"{R}/embeddings"

# Written out by hand from files of transformers 4.57: family, head, stored name, canonical name, transposed.
KNOWN = [
    ("torch", "Model", "embeddings.LayerNorm.weight", f"{R}.embeddings.LayerNorm.weight", False),
    ("torch", "ForMaskedLM", f"{LAYER}.output.dense.weight", f"{LAYER}.output.dense.weight", False),
    ("torch", "ForMaskedLM", "lm_head.decoder.weight", "lm_head.decoder.weight", False),
    ("torch", "ForMaskedLM", "lm_head.decoder.bias", "lm_head.decoder.bias", False),
    ("tf", "Model", f"{TABLES}/word_embeddings/weight:0", f"{R}.embeddings.word_embeddings.weight", False),
    ("tf", "Model", f"{TABLES}/position_embeddings/embeddings:0", f"{R}.embeddings.position_embeddings.weight", False),
    ("tf", "Model", f"{R}/encoder/layer_._1/attention/self/key/kernel:0", f"{LAYER}.attention.self.key.weight", True),
    ("tf", "Model", f"{R}/encoder/layer_._1/attention/LayerNorm/gamma:0", f"{LAYER}.attention.LayerNorm.weight", False),
    ("tf", "ForMaskedLM", "lm_head/layer_norm/beta:0", "lm_head.layer_norm.bias", False),
    ("tf", "ForMaskedLM", "lm_head/bias:0", "lm_head.bias", False),
    ("flax", "Model", "encoder/layer/1/output/dense/kernel", f"{LAYER}.output.dense.weight", True),
    ("flax", "Model", "LayerNorm/scale", f"{R}.LayerNorm.weight", False),
    ("flax", "ForMaskedLM", f"{TABLES}/word_embeddings/embedding", f"{R}.embeddings.word_embeddings.weight", False),
    ("flax", "ForMaskedLM", "lm_head/decoder/kernel", "lm_head.decoder.weight", True),
    ("flax", "ForTokenClassification", "classifier/kernel", "classifier.weight", True),
    ("flax", "ForSequenceClassification", "classifier/out_proj/kernel", "classifier.out_proj.weight", True),
]  # fmt: skip

OLD = [
    ("torch", "lm_head.layer_norm.gamma", "lm_head.layer_norm.weight"),
    ("torch", f"{LAYER}.attention.LayerNorm.beta", f"{LAYER}.attention.LayerNorm.bias"),
    ("torch", "roberta.encoder.layer.1.intermediate.dense.bias", f"{LAYER}.intermediate.dense.bias"),
    ("tf", f"{R}/embeddings/token_type_embeddings/weight:0", f"{R}.embeddings.token_type_embeddings.weight"),
    ("flax", "encoder.layer.1.output.dense.kernel", f"{LAYER}.output.dense.weight"),
]

FOREIGN = [
    ("torch", ""),
    ("torch", "weight"),
    ("torch", "step"),
    ("torch", "lm_head.decoder.gamma"),
    ("torch", "lm_head.weight"),
    ("torch", "roberta.lm_head.bias"),
    ("torch", f"{R}.encoder.layer.01.output.dense.weight"),
    ("torch", f"{R}.encoder.layer.1.output.LayerNorm.weight"),
    ("torch", f"{R}.{R}.LayerNorm.weight"),
    ("torch", "encoder/layer/1/output/dense/weight"),
    ("tf", f"{R}/encoder/layer_._1/output/dense/weight:0"),
    ("tf", "embeddings/LayerNorm/gamma:0"),
    ("tf", "lm_head/dense/kernel:1"),
    ("flax", "encoder/layer_._1/output/dense/kernel"),
    ("flax", f"{R}/LayerNorm/gamma"),
    ("flax", "roberta/LayerNorm/scale"),
]


@pytest.mark.parametrize(("family", "head", "stored", "name", "transposed"), KNOWN)
def test_known_names(family, head, stored, name, transposed):
    assert names.stored(family, name, head) == names.Name(stored, transposed)
    assert names.canonical(family, stored) == names.Name(name, transposed)


@pytest.mark.parametrize("head", schema.HEADS)
@pytest.mark.parametrize("family", names.FAMILIES)
def test_both_directions_agree(family, head):
    stored = {name: names.stored(family, name, head) for name in schema.expand(CONFIG, head)}
    assert len({target.name for target in stored.values()}) == len(stored)
    for name, target in stored.items():
        assert names.canonical(family, target.name) == names.Name(name, target.transposed)
        assert not names.dropped(family, target.name)


@pytest.mark.parametrize("name", schema.expand(CONFIG, "Model"))
def test_one_prefix_rule_gives_each_name(name):
    for stored in (name, name.removeprefix(f"{R}."), name.replace(R, "roberta", 1)):
        fitting = [
            replacement + stored.removeprefix(start)
            for _, start, replacement, _ in names.PREFIXES
            if stored.startswith(start) and replacement + stored.removeprefix(start) in schema.expand(CONFIG, "Model")
        ]
        assert fitting == [name]


@pytest.mark.parametrize(("family", "stored", "name"), OLD)
def test_old_names(family, stored, name):
    found = names.canonical(family, stored)
    assert found is not None
    assert found.name == name


@pytest.mark.parametrize(("family", "stored"), FOREIGN)
def test_foreign_names(family, stored):
    assert names.canonical(family, stored) is None
    assert not names.dropped(family, stored)


@pytest.mark.parametrize("prefix", ["", f"{R}.", "roberta."])
def test_buffers_are_dropped(prefix):
    assert names.dropped("torch", f"{prefix}embeddings.position_ids")
    assert names.dropped("torch", f"{prefix}embeddings.token_type_ids")
    assert not names.dropped("torch", f"{prefix}embeddings.position_embeddings")


def test_what_is_dropped_is_no_parameter():
    for pattern, _ in names.DROPPED:
        assert not any(re.fullmatch(pattern, name) for head in schema.HEADS for name in schema.expand(CONFIG, head))
