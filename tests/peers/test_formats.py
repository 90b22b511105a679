"""transformers reads what this library writes, and this library reads what transformers writes, bit for bit."""

import pytest

for module in ("torch", "tensorflow", "tf_keras", "flax", "transformers"):
    pytest.importorskip(module)

from tests.peers import formats

CASES = {
    "torch": 7 * (2 + 2) + 2 + 3 * (2 + 2),
    "tf": 7 * (2 + 1) + 2 + 3 * (2 + 1),
    "flax": 7 * (2 + 2) + 2 + 3 * (1 + 1),
}
"""Per library: heads times (formats it writes + formats it reads), the logits of both formats it writes, and some heads
times the formats that it writes and reads in shards."""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return formats.results(tmp_path_factory.mktemp("peers"))


@pytest.mark.parametrize("family", CASES)
def test_formats(results, family):
    ours = {case: problem for case, problem in results.items() if case.startswith(f"{family} ")}
    assert {case: problem for case, problem in ours.items() if problem} == {}
    assert len(ours) == CASES[family]
