import copy
import pickle

import pytest

from roberta_pln.outputs import BaseModelOutput, MaskedLMOutput


def test_absent_fields_are_skipped():
    record = MaskedLMOutput(logits="logits", attentions=("a", "b"))
    assert record.keys() == ("logits", "attentions")
    assert list(record) == ["logits", "attentions"]
    assert record[0] == "logits"
    assert record[0:2] == ("logits", ("a", "b"))
    assert record["attentions"] == record.attentions == ("a", "b")
    assert record.loss is None
    assert len(record) == 2
    assert dict(record.items()) == dict(**record)
    assert "loss" not in record
    assert record.get("loss", 3) == 3
    assert dict(record.named_arrays()) == {"logits": "logits", "attentions.0": "a", "attentions.1": "b"}


def test_the_loss_comes_first():
    assert MaskedLMOutput(loss=1.0, logits=2.0)[0] == 1.0


def test_missing_keys():
    record = MaskedLMOutput(logits=1)
    with pytest.raises(KeyError, match="has no 'loss'; it has logits"):
        record["loss"]
    with pytest.raises(IndexError):
        record[1]


def test_the_plain_form_of_the_base_model():
    """A pooler that is not there is None, and the cache comes before the hidden states."""
    record = BaseModelOutput(last_hidden_state=1, hidden_states=2, past_key_values=3)
    assert record.plain() == (1, None, 3, 2)
    assert record.to_tuple() == (1, 2, 3)


def test_copies():
    record = MaskedLMOutput(logits=[1])
    assert copy.deepcopy(record).logits == pickle.loads(pickle.dumps(record)).logits == [1]
