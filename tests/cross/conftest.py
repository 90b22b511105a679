"""What the comparisons of backends share."""

import importlib.util

import pytest


@pytest.fixture(autouse=True, scope="package")
def quick_compilation():
    """JAX compiles much here that runs once or twice, and so optimises little; tests/flax has it as users do."""
    if importlib.util.find_spec("jax") is None:
        yield
        return
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
