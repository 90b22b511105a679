"""Damaged and malicious checkpoints, each made from a seed.

A `Sample` is a small whole checkpoint. Damage is the same for all of them: whatever can happen to bytes, wherever they
are. Attacks are what somebody would build on purpose, by format, each a few lines below `@attack`. A new format in
`FORMATS` is damaged without a word here; further forms of it are rows of `SAMPLES`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from roberta_pln import checkpoint, schema
from roberta_pln.checkpoint import FILES, FORMATS, CheckpointError
from tests.checkpoint import builders
from tests.contract import random_tensors, tiny_config

CONFIG = tiny_config(
    vocab_size=5,
    hidden_size=2,
    num_hidden_layers=1,
    num_attention_heads=1,
    intermediate_size=3,
    max_position_embeddings=4,
    type_vocab_size=1,
)
HEAD = "ForMaskedLM"
Files = dict[str, bytes]


@dataclass(frozen=True)
class Sample:
    """A whole checkpoint.

    Attributes:
        files: content by path in the folder.
        target: what is opened, in the folder; empty for the folder itself.
        tensors: what is to be read.
    """

    files: Files
    target: str
    tensors: dict[str, np.ndarray]

    @property
    def weights(self) -> list[str]:
        """The files that hold more than a config."""
        return [name for name in self.files if name != "config.json"]


@dataclass(frozen=True)
class Case:
    """One checkpoint to open.

    Attributes:
        files: content by path in the folder.
        target: what is opened, in the folder; empty for the folder itself.
        refused: whether it must not open.
        tensors: what must be read under the names that it has, if it opens; None for any numbers.
        zeros: whether a tensor may also be zeros.
        kept: files that nobody may touch.
        links: symbolic links by path in the folder; `{outside}` stands for a folder that nobody may look into.
        pipes: named pipes in the folder, in which nothing will ever come.
    """

    files: Files
    target: str = ""
    refused: bool = True
    tensors: dict[str, np.ndarray | None] = field(default_factory=dict)
    zeros: bool = False
    kept: tuple[str, ...] = ()
    links: dict[str, str] = field(default_factory=dict)
    pipes: tuple[str, ...] = ()


# ------------------------------------------------------------------ samples


def tensors(format: str = "safetensors") -> dict[str, np.ndarray]:
    found = random_tensors(CONFIG, HEAD)
    if format == "fairseq":  # which has no token types
        found[f"{schema.PREFIX}.embeddings.token_type_embeddings.weight"][:] = 0
    return found


def saved(format: str, **options: Any) -> Files:
    """What `save` writes."""
    with TemporaryDirectory() as folder:
        checkpoint.save(tensors(format), folder, CONFIG, HEAD, format, **options)
        return contents(Path(folder))


def contents(folder: Path) -> Files:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _h5_since_1_8() -> Sample:
    files = saved("h5")
    return Sample(files | {FILES["h5"]: builders.h5_anew(files[FILES["h5"]])}, "", tensors())


def _keras_archive() -> Sample:
    files = saved("keras")
    config = {"class_name": f"RobertaPreLayerNorm{HEAD}", "config": {"config": json.loads(files["config.json"])}}
    members = {"config.json": json.dumps(config).encode(), "model.weights.h5": files[FILES["keras"]]}
    return Sample({"model.keras": builders.zipped(members)}, "model.keras", tensors())


def _torch_before_1_6() -> Sample:
    files = saved("torch")
    return Sample(files | {FILES["torch"]: builders.legacy_of(files[FILES["torch"]])}, "", tensors())


def _fairseq_alone() -> Sample:
    files = saved("fairseq")
    del files["config.json"]
    return Sample(files, "", tensors("fairseq"))


def _orbax_database() -> Sample:
    """Without the files of earlier states of the database, which nothing reads."""
    files = builders.orbax_packed(saved("orbax"), database=True)
    with TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(folder) / name).write_bytes(content)
        for name in [name for name in files if "/d/" in name]:
            (Path(folder) / name).unlink()
            try:
                checkpoint.inspect(folder)
            except CheckpointError:
                (Path(folder) / name).write_bytes(files[name])
        return Sample(contents(Path(folder)), "", tensors())


SAMPLES: dict[str, Callable[[], Sample]] = {
    **{name: lambda name=name: Sample(saved(name), "", tensors(name)) for name in FORMATS},
    "safetensors in shards": lambda: Sample(saved("safetensors", max_shard_size=120), "", tensors()),
    "h5 in shards": lambda: Sample(saved("h5", max_shard_size=200), "", tensors()),
    "h5 since 1.8": _h5_since_1_8,
    "keras archive": _keras_archive,
    "torch before 1.6": _torch_before_1_6,
    "fairseq alone": _fairseq_alone,
    "orbax, packed": lambda: Sample(builders.orbax_packed(saved("orbax"), database=False), "", tensors()),
    "orbax, database": _orbax_database,
}


@cache
def sample(name: str) -> Sample:
    return SAMPLES[name]()


# ------------------------------------------------------------------ damage


@cache
def pieces(name: str) -> dict[str, tuple[str, int, int, bool]]:
    """Where a sample has the bytes of each tensor: file, start, end, and whether they are of the transpose."""
    found = {}
    for tensor, array in sample(name).tensors.items():
        for file, content in sample(name).files.items():
            for turned in (False, True):
                data = (array.T if turned else array).tobytes()
                if content.count(data) == 1:
                    found[tensor] = file, content.index(data), content.index(data) + len(data), turned
    return found


def data(name: str, file: str) -> set[int]:
    """The bytes of a file that are numbers of tensors."""
    return {at for own, start, end, _ in pieces(name).values() if own == file for at in range(start, end)}


def edges(name: str, file: str) -> list[int]:
    """Where something begins or ends in a file."""
    size = len(sample(name).files[file])
    ends = {0, 1, 2, 4, 8, 16, 48, 96, size} | {
        at for own, *ends, _ in pieces(name).values() if own == file for at in ends
    }
    return sorted(at + step for at in ends for step in (-1, 0, 1) if 0 <= at + step < size)


def cut(rng: random.Random, name: str, file: str) -> bytes:
    content = sample(name).files[file]
    return content[: rng.choice([rng.choice(edges(name, file)), rng.randrange(len(content))])]


def flip_header(rng: random.Random, name: str, file: str) -> bytes:
    """Change bits of what is no tensor; mostly of bytes near others that are not zero, as files have long gaps."""
    content = bytearray(sample(name).files[file])
    places = places_of_header(name, file)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        content[rng.choice(places)] ^= 1 << rng.randrange(8)
    return bytes(content)


@cache
def places_of_header(name: str, file: str) -> list[int]:
    content, numbers = sample(name).files[file], data(name, file)
    return [at for at in range(len(content)) if at not in numbers and any(content[max(0, at - 8) : at + 8])] or [0]


def flip_data(rng: random.Random, name: str, file: str) -> bytes:
    content = bytearray(sample(name).files[file])
    for _ in range(rng.choice([1, 8])):
        content[rng.choice(sorted(data(name, file)) or [0])] ^= 1 << rng.randrange(8)
    return bytes(content)


def numbers(rng: random.Random, name: str, file: str) -> bytes:
    """Put an extreme number where one may be."""
    content = bytearray(sample(name).files[file])
    width = rng.choice([1, 2, 4, 8])
    at = rng.choice(places_of_header(name, file))
    old = int.from_bytes(content[at : at + width], "little")
    largest = 256**width - 1
    extremes = [
        0,
        1,
        largest,
        largest // 2,
        largest // 2 + 1,
        len(content),
        len(content) - 1,
        old + 1,
        old - 1,
        old * 2,
    ]
    new = rng.choice(extremes) & largest
    content[at : at + width] = new.to_bytes(width, rng.choice(["little", "little", "big"]))
    return bytes(content)


def blocks(rng: random.Random, name: str, file: str) -> bytes:
    """Delete, insert, repeat or exchange some bytes that are no tensor, or fill them with zeros or ones."""
    content = sample(name).files[file]
    at, other = sorted(rng.choice(places_of_header(name, file)) for _ in range(2))
    size = rng.choice([1, 2, 4, 8, 16, 40, 64, 512])
    block, rest = content[at : at + size], content[at + size :]
    match rng.choice(["delete", "insert", "repeat", "zeros", "ones", "exchange"]):
        case "delete":
            return content[:at] + rest
        case "insert":
            return content[:at] + rng.randbytes(size) + content[at:]
        case "repeat":
            return content[:at] + block + block + rest
        case "zeros":
            return content[:at] + bytes(len(block)) + rest
        case "ones":
            return content[:at] + b"\xff" * len(block) + rest
    size = min(size, other - at, len(content) - other)
    return (
        content[:at] + content[other : other + size] + content[at + size : other]
        + content[at : at + size] + content[other + size :]
    )  # fmt: skip


DAMAGE = {cut: 40, flip_header: 130, flip_data: 20, numbers: 80, blocks: 60}
"""What is done to a sample, and how many times; less often to one of many files, which takes longer to lay out."""
MANY_FILES = 40

PACKED = ("orbax, packed", "orbax, database")
"""Where numbers lie together with how they are packed, without a checksum."""
WITHOUT_CHECKSUMS = ("h5", "h5 in shards", "keras", "keras archive")
"""Where a damaged address may lead to bytes that nothing uses, which are zeros."""
TEXTS = (".json", ".zarray", "_METADATA")
"""Files that may end in white space, so that they can be cut without loss."""


def damaged(damage: Callable[..., bytes], name: str, seed: int) -> Case:
    rng = random.Random(f"{name}/{damage.__name__}/{seed}")
    whole = sample(name)
    file = rng.choice(whole.weights)
    if damage is flip_data and pieces(name):
        file = rng.choice([own for own, *_ in pieces(name).values()])
    content = damage(rng, name, file)
    return Case(
        whole.files | {file: content},
        whole.target,
        refused=damage is cut and not file.endswith(TEXTS) and name != "orbax, database",  # which has older states too
        tensors=whole.tensors | tensors_in(name, file, content),
        zeros=name in WITHOUT_CHECKSUMS,
    )


def tensors_in(name: str, file: str, content: bytes) -> dict[str, np.ndarray | None]:
    """What tensors are by the bytes that a file has now, if it has as many as it had."""
    found: dict[str, np.ndarray | None] = {}
    for tensor, (own, start, end, turned) in pieces(name).items():
        if own == file and name in PACKED:
            found[tensor] = None
        elif own == file and len(content) == len(sample(name).files[file]):
            array = sample(name).tensors[tensor]
            flat = np.frombuffer(content[start:end], array.dtype)
            found[tensor] = flat.reshape(array.shape[::-1]).T if turned else flat.reshape(array.shape)
    return found


# ------------------------------------------------------------------ attacks

ATTACKS: dict[str, list[Callable[[str], Iterator[Case]]]] = {name: [] for name in SAMPLES}


def attack(*names: str):
    """Register what makes cases of some samples."""

    def register(function: Callable[[str], Iterator[Case]]):
        for name in names:
            ATTACKS[name].append(function)
        return function

    return register


def instead(name: str, content: bytes, file: str = "", refused: bool = True) -> Case:
    """A sample with other content in its first weight file."""
    whole = sample(name)
    return Case(whole.files | {file or whole.weights[0]: content}, whole.target, refused, whole.tensors)


def cases(name: str) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Every case that starts from a sample, by name."""
    for damage, count in DAMAGE.items():
        few = len(sample(name).files) > MANY_FILES or name in PACKED
        for seed in range(count // 3 if few else count):
            yield f"{name}/{damage.__name__}/{seed}", lambda damage=damage, seed=seed: damaged(damage, name, seed)
    for function in ATTACKS[name]:
        for number, case in enumerate(function(name)):
            yield f"{name}/{function.__name__}/{number}", lambda case=case: case
