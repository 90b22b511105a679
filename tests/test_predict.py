import numpy as np
import pytest

from roberta_pln import backends, predict
from roberta_pln.demo import ASSET


def test_most_probable():
    found = predict.most_probable(np.log([0.1, 0.6, 0.3]), 2)
    assert [index for index, _ in found] == [1, 2]
    np.testing.assert_allclose([p for _, p in found], [0.6, 0.3], rtol=1e-15)
    assert [index for index, _ in predict.most_probable(np.zeros(4), 3)] == [0, 1, 2]
    assert predict.most_probable(np.array([1e4, 0.0]), 1) == [(0, 1.0)]


@pytest.mark.parametrize("backend", backends.installed())
def test_fill_mask(backend):
    texts = ["And God <mask> unto Moses.", "The <mask> of the <mask>."]
    found = list(predict.fill_mask(ASSET, texts, backend, top=3))
    assert [item["text"] for item in found] == texts
    assert [len(item["masks"]) for item in found] == [1, 2]
    tokens = found[0]["masks"][0]["tokens"]
    assert len(tokens) == 3
    assert tokens[0]["probability"] >= tokens[1]["probability"] > 0
    assert tokens[0]["token"] in (" said", " spake")
    assert tokens[0]["text"] == f"And God{tokens[0]['token']} unto Moses."
    assert found[1]["masks"][1]["tokens"][0]["text"].startswith("The <mask> of the ")


def test_refusals():
    with pytest.raises(ValueError, match="must hold <mask> .* got 'no mask'"):
        list(predict.fill_mask(ASSET, ["no mask"]))
    with pytest.raises(ValueError, match="top must be at least 1"):
        list(predict.fill_mask(ASSET, ["a <mask>"], top=0))
    with pytest.raises(ValueError, match="at most max_length"):
        list(predict.fill_mask(ASSET, ["many words " * 200 + "<mask>"]))
    with pytest.raises(FileNotFoundError):
        list(predict.fill_mask(ASSET / "nowhere", ["a <mask>"]))
