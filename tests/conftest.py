"""What every test shares: quiet frameworks, and transformers' TensorFlow classes on the Keras they need.

`TF_USE_LEGACY_KERAS` only moves `tf.keras`, which transformers uses; `import keras`, which this library uses, stays.
"""

import gc
import os
import sys
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
for threads in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "NPROC"):
    os.environ.setdefault(threads, "1")  # tests run side by side, and threads of tiny models only wait for each other

# XLA compiles thousands of tiny programs, to run once or twice each; test_readme and test_sharding do as users do.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.gettempdir() + "/roberta-pln-tests-jax")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # what one process has compiled, others read
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

LARGE = 3 * 2**30
"""Bytes of a process above which what JAX has compiled is given back."""


@pytest.fixture(autouse=True, scope="module")
def bounded_memory():
    """Thousands of small programs take gigabytes in the end, and the million objects of three frameworks, of which none
    goes, would be searched for garbage again and again."""
    yield
    if "jax" in sys.modules and resident() > LARGE:
        sys.modules["jax"].clear_caches()
        gc.unfreeze()
    gc.collect()
    gc.freeze()


def resident() -> int:
    """Bytes of this process in memory; 0 where the system does not tell."""
    told = Path("/proc/self/statm")
    return int(told.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if told.is_file() else 0
