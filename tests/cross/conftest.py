"""What the comparisons of backends share."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def quick(quick_compilation):
    """Every one of them compiles much."""
