"""Which frameworks an import loads, and what it costs."""

import subprocess
import sys

import pytest

from roberta_pln.backends import BACKENDS, installed

FRAMEWORKS = {"torch": "pt", "tensorflow": "tf", "keras": "tf", "jax": "flax", "flax": "flax"}
NEUTRAL = ["", ".checkpoint", ".cli", ".demo", ".loading", ".names", ".parity", ".predict", ".tokenizer", ".worker"]

LOADED = """
import sys
import {modules}
print(*(name for name in {frameworks} if name in sys.modules))
"""


def loaded(modules: str) -> set[str]:
    code = LOADED.format(modules=modules, frameworks=list(FRAMEWORKS))
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_the_package_loads_no_framework():
    code = "\n".join(f"import roberta_pln{name}" for name in NEUTRAL)
    assert loaded(f"roberta_pln\n{code}") == set()


@pytest.mark.parametrize("backend", installed())
def test_a_backend_loads_its_own_framework_only(backend):
    own = {name for name, owner in FRAMEWORKS.items() if owner == backend}
    brought = loaded(", ".join(sorted(own)))  # Keras itself imports JAX where it is installed
    assert loaded(f"roberta_pln.{backend}") == own | brought
    assert "torch" not in brought or backend == "pt"


def test_the_table_of_backends_is_whole():
    assert set(BACKENDS) == set(FRAMEWORKS.values())
