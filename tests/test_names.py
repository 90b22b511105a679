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
ACT = f"{LAYER}.intermediate.intermediate_act_fn"
TABLES = f"{R}/embeddings"
S = "encoder.sentence_encoder"
CLASSES = "classification_heads.sentence_classification_head"

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
    ("torch", "ForMaskedLM", f"{ACT}.alpha_p", f"{ACT}.alpha_p", False),
    ("torch", "ForMaskedLM", f"{ACT}.weight", f"{ACT}.weight", False),
    ("tf", "ForMaskedLM", "lm_head/layer_norm/beta:0", "lm_head.layer_norm.bias", False),
    ("tf", "ForMaskedLM", "lm_head/bias:0", "lm_head.bias", False),
    ("flax", "Model", "encoder/layer/1/output/dense/kernel", f"{LAYER}.output.dense.weight", True),
    ("flax", "Model", "LayerNorm/scale", f"{R}.LayerNorm.weight", False),
    ("flax", "ForMaskedLM", f"{TABLES}/word_embeddings/embedding", f"{R}.embeddings.word_embeddings.weight", False),
    ("flax", "ForMaskedLM", "lm_head/decoder/kernel", "lm_head.decoder.weight", True),
    ("flax", "ForTokenClassification", "classifier/kernel", "classifier.weight", True),
    ("flax", "ForSequenceClassification", "classifier/out_proj/kernel", "classifier.out_proj.weight", True),
    ("fairseq", "ForMaskedLM", f"{S}.embed_tokens.weight", f"{R}.embeddings.word_embeddings.weight", False),
    ("fairseq", "ForMaskedLM", f"{S}.layer_norm.bias", f"{R}.LayerNorm.bias", False),
    ("fairseq", "ForMaskedLM", f"{S}.layers.1.self_attn.k_proj.weight", f"{LAYER}.attention.self.key.weight", False),
    ("fairseq", "ForMaskedLM", f"{S}.layers.1.final_layer_norm.bias", f"{LAYER}.intermediate.LayerNorm.bias", False),
    ("fairseq", "ForMaskedLM", f"{S}.layers.1.fc2.weight", f"{LAYER}.output.dense.weight", False),
    ("fairseq", "ForMaskedLM", "encoder.lm_head.bias", "lm_head.bias", False),
    ("fairseq", "ForMaskedLM", "encoder.lm_head.weight", "lm_head.decoder.weight", False),
    ("fairseq", "ForMaskedLM", "encoder.lm_head.layer_norm.weight", "lm_head.layer_norm.weight", False),
    ("fairseq", "ForSequenceClassification", f"{CLASSES}.out_proj.bias", "classifier.out_proj.bias", False),
]  # fmt: skip

OLD = [
    ("torch", "lm_head.layer_norm.gamma", "lm_head.layer_norm.weight"),
    ("torch", f"{LAYER}.attention.LayerNorm.beta", f"{LAYER}.attention.LayerNorm.bias"),
    ("torch", "roberta.encoder.layer.1.intermediate.dense.bias", f"{LAYER}.intermediate.dense.bias"),
    ("tf", f"{R}/embeddings/token_type_embeddings/weight:0", f"{R}.embeddings.token_type_embeddings.weight"),
    ("flax", "encoder.layer.1.output.dense.kernel", f"{LAYER}.output.dense.weight"),
    ("fairseq", "classification_heads.mnli.dense.weight", "classifier.dense.weight"),
]

QUERY_KEY_VALUE = [f"{S}.layers.1.self_attn.{part}_proj" for part in "qkv"]

# fairseq's old names and DeepSpeed's, and what fairseq has today.
TODAY = [
    ("decoder.lm_head.bias", ["encoder.lm_head.bias"]),
    ("decoder.sentence_encoder.emb_layer_norm.bias", [f"{S}.layernorm_embedding.bias"]),
    (f"{S}.layers.1.layer_norms.0.bias", [f"{S}.layers.1.self_attn_layer_norm.bias"]),
    (f"{S}.layers.1.layer_norms.1.bias", [f"{S}.layers.1.final_layer_norm.bias"]),
    (f"{S}.layers.1.self_attn.in_proj_bias", [f"{part}.bias" for part in QUERY_KEY_VALUE]),
    (f"{S}.layers.1.attn_qkvw", [f"{part}.weight" for part in QUERY_KEY_VALUE]),
    (f"{S}.layers.1.attn_ob", [f"{S}.layers.1.self_attn.out_proj.bias"]),
    (f"{S}.layers.1.norm_w", [f"{S}.layers.1.self_attn_layer_norm.weight"]),
    (f"{S}.layers.1.attn_nw", [f"{S}.layers.1.final_layer_norm.weight"]),
    (f"{S}.layers.1.inter_b", [f"{S}.layers.1.fc1.bias"]),
    (f"{S}.layers.1.output_w", [f"{S}.layers.1.fc2.weight"]),
    (f"{S}.layers.1.fc2.weight", [f"{S}.layers.1.fc2.weight"]),
    ("encoder.step", ["encoder.step"]),
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
    ("fairseq", ""),
    ("fairseq", "encoder.lm_head.gamma"),
    ("fairseq", f"{S}.embed_tokens.bias"),
    ("fairseq", f"{S}.layers.01.fc1.weight"),
    ("fairseq", f"{S}.layers.{{i}}.fc1.weight"),
    ("fairseq", f"{S}.layers.1.attn_qkvw"),
    ("fairseq", f"x.{S}.layer_norm.weight"),
    ("fairseq", "classification_heads.a.b.dense.weight"),
    ("fairseq", f"{R}.LayerNorm.weight"),
]


@pytest.mark.parametrize(("family", "head", "stored", "name", "transposed"), KNOWN)
def test_known_names(family, head, stored, name, transposed):
    assert names.stored(family, name, head) == names.Name(stored, transposed)
    assert names.canonical(family, stored) == names.Name(name, transposed)


@pytest.mark.parametrize("act", ["gelu", "prelu", "xielu"])
@pytest.mark.parametrize("head", schema.HEADS)
@pytest.mark.parametrize("family", names.FAMILIES)
def test_both_directions_agree(family, head, act):
    stored = {name: names.stored(family, name, head) for name in schema.expand(CONFIG.replace(hidden_act=act), head)}
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
    assert names.dropped("torch", f"{prefix}encoder.layer.0.intermediate.intermediate_act_fn.beta")
    assert not names.dropped("fairseq", f"{prefix}embeddings.position_ids")
    assert not names.dropped("torch", f"{prefix}embeddings.position_embeddings")


@pytest.mark.parametrize("act", ["gelu", "prelu", "xielu"])
def test_what_is_dropped_is_no_parameter(act):
    config = CONFIG.replace(hidden_act=act)
    for family, pattern, _ in names.DROPPED:
        parameters = {name for head in schema.HEADS for name in schema.expand(config, head)}
        stored = {names.stored(family, name, "ForMaskedLM").name for name in parameters if held(family, name)}
        assert stored
        assert not any(re.fullmatch(pattern, name) for name in stored)


def held(family, name):
    """Whether a family has a name for a parameter."""
    try:
        return bool(names.stored(family, name, "ForMaskedLM"))
    except ValueError:
        return False


@pytest.mark.parametrize(("stored", "today"), TODAY)
def test_what_fairseq_has_today(stored, today):
    assert names.fairseq_today(stored) == today
    for name in today:
        assert names.fairseq_today(name) == [name]
        assert (names.canonical("fairseq", name) is None) == (name == "encoder.step")


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForSequenceClassification"])
def test_fairseq_lacks_the_token_types_alone(head):
    config = tiny_config(tie_word_embeddings=False)
    stored = {
        name: names.stored("fairseq", name, head).name for name in schema.expand(config, head) if held("fairseq", name)
    }
    assert schema.expand(config, head).keys() - stored == {f"{R}.embeddings.token_type_embeddings.weight"}
    assert len(set(stored.values())) == len(stored)
    for name, target in stored.items():
        assert names.canonical("fairseq", target) == names.Name(name)
        assert names.fairseq_today(target) == [target]
        assert not names.dropped("fairseq", target)


@pytest.mark.parametrize(
    "name", ["qa_outputs.weight", f"{R}.pooler.dense.bias", f"{LAYER}.crossattention.LayerNorm.bias"]
)
def test_what_fairseq_has_no_name_for(name):
    with pytest.raises(ValueError, match=f"fairseq has no parameter {name}"):
        names.stored("fairseq", name, "ForMaskedLM")
