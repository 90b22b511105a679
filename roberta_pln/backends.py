"""The three backends: what each needs, which are installed, and how to work with one in a process of its own."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np

from roberta_pln import schema

Arrays = Mapping[str, np.ndarray]


class BackendError(RuntimeError):
    """A backend is not installed, or failed in its own process."""


@dataclass(frozen=True)
class Backend:
    """One backend.

    Attributes:
        name: subpackage of `roberta_pln`, and extra of the distribution.
        title: what people call it.
        packages: what has to be importable.
        native_format: the framework's own format on disk, one of `checkpoint.FORMATS`.
    """

    name: str
    title: str
    packages: tuple[str, ...]
    native_format: str

    def missing(self) -> tuple[str, ...]:
        """Packages that are not installed."""
        return tuple(package for package in self.packages if importlib.util.find_spec(package) is None)

    def load(self) -> ModuleType:
        """Import `roberta_pln.<name>`.

        Raises:
            BackendError: saying what to install.
        """
        if self.missing():
            raise BackendError(self.advice())
        with hushed():
            return importlib.import_module(f"roberta_pln.{self.name}")

    def advice(self) -> str:
        """One line that says what is missing and how to get it."""
        packages = ", ".join(self.missing())
        return f"{self.title} is not available: install {packages} (pip install 'roberta_pln[{self.name}]')"

    def model_class(self, head: str) -> Any:
        """The class of a head in this backend."""
        schema.check_head(head)
        name = schema.architecture(head)
        module = self.load()
        if not hasattr(module, name):
            raise BackendError(f"roberta_pln.{self.name} has no {name}")
        return getattr(module, name)


BACKENDS: Final = {
    backend.name: backend
    for backend in (
        Backend("pt", "PyTorch", ("torch",), "torch"),
        Backend("tf", "TensorFlow", ("tensorflow", "h5py"), "h5"),
        Backend("flax", "Flax", ("jax", "flax"), "msgpack"),
    )
}


def installed() -> tuple[str, ...]:
    """Names of the backends whose packages are there."""
    return tuple(name for name, backend in BACKENDS.items() if not backend.missing())


def choose(names: Sequence[str] | None) -> tuple[str, ...]:
    """The backends asked for, or all that are installed.

    Raises:
        BackendError: when a name is unknown, or none is installed.
    """
    for name in names or ():
        if name not in BACKENDS:
            raise BackendError(f"unknown backend {name!r}; the backends are {', '.join(BACKENDS)}")
        if BACKENDS[name].missing():
            raise BackendError(BACKENDS[name].advice())
    found = tuple(names) if names else installed()
    if not found:
        raise BackendError(
            "no backend is installed: pip install 'roberta_pln[pt]', 'roberta_pln[tf]' or 'roberta_pln[flax]'"
        )
    return found


def quiet() -> None:
    """Keep the frameworks' messages out of the output; call it before one is imported."""
    os.environ.update({name: value for name, value in _QUIET.items() if name not in os.environ})


@contextmanager
def hushed() -> Iterator[None]:
    """Keep back what is written to the standard error stream, and write it after all if the block fails.

    TensorFlow's libraries write there when they are loaded, whatever the log level.
    """
    with tempfile.TemporaryFile() as kept:
        sys.stderr.flush()
        stream = os.dup(2)
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except BaseException:
            kept.seek(0)
            os.write(stream, kept.read())
            raise
        finally:
            os.dup2(stream, 2)
            os.close(stream)


_QUIET: Final = {"TF_CPP_MIN_LOG_LEVEL": "3", "KERAS_BACKEND": "tensorflow"}


# ---------------------------------------------------------------- work in another process


@dataclass(frozen=True)
class Request:
    """One thing to do with a model.

    Attributes:
        path: the checkpoint.
        head: one of `schema.HEADS`.
        dtype: one of `config.DTYPES`.
        inputs: arguments of the call, in NumPy.
        gradients: also the gradient of every parameter.
        round_trip: instead of calling the model, save it in the backend's own format into this folder, load that, and
            save it there again as safetensors.
    """

    path: str
    head: str
    dtype: str
    inputs: Arrays = field(default_factory=dict)
    gradients: bool = False
    round_trip: str | None = None


def answer(backend: str, request: Request) -> dict[str, np.ndarray]:
    """Do what a request asks in this process.

    Returns:
        The arrays of the record by name (`logits`, `hidden_states.0`, ...), and `gradient.<canonical name>` of every
        parameter if asked for; nothing for a round trip.
    """
    model_class = BACKENDS[backend].model_class(request.head)
    if request.round_trip is None:
        probe = importlib.import_module(f"roberta_pln.{backend}.probe")
        model = model_class.from_pretrained(request.path, dtype=request.dtype)
        arrays: dict[str, np.ndarray] = probe.run(model, dict(request.inputs), request.gradients)
        return arrays
    native, back = Path(request.round_trip) / "native", Path(request.round_trip) / "back"
    model_class.from_pretrained(request.path, dtype=request.dtype).save_pretrained(native, safe_serialization=False)
    model_class.from_pretrained(native, dtype=request.dtype).save_pretrained(back)
    return {}


def run(
    backend: str, requests: Sequence[Request], progress: Callable[[int], None] = lambda done: None
) -> list[dict[str, np.ndarray]]:
    """Do what some requests ask in one fresh process, so that its memory is given back.

    Args:
        backend: a key of `BACKENDS`.
        requests: what to do, in order.
        progress: called with the number of requests that are done.

    Returns:
        What `answer` returns, for each request.

    Raises:
        BackendError: with the end of the process's messages when it fails.
    """
    with tempfile.TemporaryDirectory(prefix="roberta_pln-") as folder:
        for index, request in enumerate(requests):
            np.savez(Path(folder, f"inputs-{index}.npz"), **request.inputs)  # type: ignore[arg-type]
        jobs = [{**asdict(request), "inputs": {}} for request in requests]
        Path(folder, "jobs.json").write_text(json.dumps({"backend": backend, "requests": jobs}), encoding="utf-8")
        with open(Path(folder, "messages"), "w+", encoding="utf-8", errors="replace") as messages:
            process = subprocess.Popen(
                [sys.executable, "-m", "roberta_pln.worker", folder],
                stdout=subprocess.PIPE,
                stderr=messages,
                text=True,
                env=_environment(requests),
            )
            with process:
                assert process.stdout is not None
                for line in process.stdout:
                    progress(int(line))
            if process.returncode:
                messages.seek(0)
                tail = "".join(messages.readlines()[-15:]).strip()
                raise BackendError(f"{BACKENDS[backend].title} failed with status {process.returncode}:\n{tail}")
        return [_read(Path(folder, f"outputs-{index}.npz")) for index in range(len(requests))]


def _environment(requests: Sequence[Request]) -> dict[str, str]:
    environment = {**_QUIET, **os.environ}
    if any(request.dtype == "float64" for request in requests):
        environment["JAX_ENABLE_X64"] = "1"
    return environment


def _read(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)
