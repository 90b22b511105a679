"""What the tests of generation share."""

import pytest

from roberta_pln import backends
from tests.contract import precision


@pytest.fixture(params=backends.installed())
def backend(request):
    """The name of a backend that computes in float64 if it is asked to."""
    with precision(request.param, "float64"):
        yield request.param
