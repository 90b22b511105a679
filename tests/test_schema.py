import pytest

from roberta_pln import schema
from roberta_pln.config import RobertaPreLayerNormConfig
from tests.contract import TINY, tiny_config

V, H, N, A, F, P, T = 99, 32, 2, 4, 37, 40, 2

COUNTS = {
    "Model": 19274,
    "ForCausalLM": 19437,
    "ForMaskedLM": 19437,
    "ForSequenceClassification": 19340,
    "ForMultipleChoice": 19307,
    "ForTokenClassification": 18284,
    "ForQuestionAnswering": 18284,
}
"""Parameters of transformers' classes at these sizes, counted there."""


@pytest.mark.parametrize("head", schema.HEADS)
def test_parameter_counts(head):
    assert sum(parameter.size for parameter in schema.expand(tiny_config(), head).values()) == COUNTS[head]


@pytest.mark.parametrize("head", schema.HEADS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_labels": 2, "tie_word_embeddings": False},
        {"is_decoder": True, "add_cross_attention": True},
        {"position_embedding_type": "relative_key"},
        {"pruned_heads": {1: [0, 2]}},
        {"hidden_act": "prelu"},
        {"hidden_act": "xielu"},
    ],
)
def test_names_and_shapes_are_those_of_transformers(head, changes):
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, schema.architecture(head))(
        transformers.RobertaPreLayerNormConfig(**{**TINY, **changes})
    )
    ours = schema.expand(tiny_config(**changes), head)
    aliases = schema.ties(tiny_config(**changes), head)
    constants = {schema.path(name, head): () for name in schema.constants(tiny_config(**changes))}
    state = {name: tuple(value.shape) for name, value in theirs.state_dict().items() if name not in aliases}
    assert {name: state.pop(name) for name in constants} == constants
    assert {schema.path(name, head): parameter.shape for name, parameter in ours.items()} == state
    assert set(aliases) <= set(theirs.state_dict())


def test_order_is_that_of_the_forward_pass():
    names = list(schema.expand(tiny_config(), "ForMaskedLM"))
    first = [name.split(".layer.")[1][0] for name in names if ".layer." in name]
    assert first == sorted(first)
    assert names[0].endswith("word_embeddings.weight")
    assert names[-1] == "lm_head.bias"


def test_initializers():
    parameters = schema.expand(tiny_config(), "ForMaskedLM")
    kinds = {
        name.rpartition(".")[0].rpartition(".")[2] + "." + p.leaf.name: p.initializer for name, p in parameters.items()
    }
    assert kinds["query.weight"] == kinds["word_embeddings.weight"] == "normal"
    assert kinds["query.bias"] == kinds["lm_head.bias"] == kinds["LayerNorm.bias"] == 0
    assert kinds["LayerNorm.weight"] == 1
    learned = schema.expand(tiny_config(hidden_act="prelu"), "Model").values()
    assert [p.initializer for p in learned if "act_fn" in p.name] == [0.25, 0.25]


def test_heads():
    with pytest.raises(ValueError, match="unknown head 'ForNothing'; the heads are Model, "):
        schema.expand(RobertaPreLayerNormConfig(), "ForNothing")
    assert schema.head_of(["TFRobertaPreLayerNormForMaskedLM"]) == "ForMaskedLM"
    assert schema.head_of(["RobertaForMaskedLM"]) is None
    assert schema.head_of(None) is None
