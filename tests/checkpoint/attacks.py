"""What somebody would build on purpose, by format: every function gives the cases of one idea."""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from roberta_pln.checkpoint import FILES, atomic
from tests.checkpoint import builders
from tests.checkpoint.builders import ODD_VALUES, name, number, odd_json, odd_texts, patched, storage, tensor, text
from tests.checkpoint.hostile import WITHOUT_CHECKSUMS, Case, Files, attack, instead, pieces, sample

COMMAND = "touch ran"
"""What attacks run, if anything in them runs; whoever opens them is in a folder where that file must not be."""
HUGE = [2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


def values(whole: Files, file: str) -> Any:
    return json.loads(whole[file])


# ------------------------------------------------------------------ config.json, index files, journals


@attack("safetensors")
def odd_configs(own: str) -> Iterator[Case]:
    whole = sample(own)
    config = values(whole.files, "config.json") | {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}
    config |= {"pruned_heads": {}, "num_labels": 2, "problem_type": None, "torch_dtype": "float32", "extra": {}}
    for seed in range(900):
        rng = random.Random(seed)
        odd = config
        for _ in range(rng.choice([1, 1, 2, 3])):
            odd = odd_json(rng, odd)
        yield instead(own, json.dumps(odd).encode(), "config.json", refused=False)
    for key in [
        *config,
        "self",
        "cls",
        "args",
        "kwargs",
        "extra",
        "validate",
        "__class__",
        "__dict__",
        "num_labels",
        "",
    ]:
        for value in ODD_VALUES:
            yield instead(own, json.dumps(config | {key: value}).encode(), "config.json", refused=False)
    for content in odd_texts(config):
        yield instead(own, content, "config.json", refused=False)
    for key in config:
        yield instead(own, json.dumps(config | {key: 10**9}).encode(), "config.json", refused=False)


@attack("fairseq", "keras archive")
def odd_configs_beside(own: str) -> Iterator[Case]:
    config = values(sample("safetensors").files, "config.json")
    for key in config:
        for value in [*ODD_VALUES[::2], 10**9]:
            if key == "type_vocab_size" and isinstance(value, int) and 1 < value < 100:
                continue  # which is right: fairseq's files have none, and so any number of them
            odd = json.dumps(config | {key: value}).encode()
            if own == "fairseq":
                yield instead(own, odd, "config.json", refused=False)
            else:
                whole = builders.members(sample(own).files["model.keras"])
                model = values(whole, "config.json")
                model["config"]["config"] = json.loads(odd)
                members = whole | {"config.json": json.dumps(model).encode()}
                yield instead(own, builders.zipped(members), refused=False)


@attack("keras archive")
def odd_model_configs(own: str) -> Iterator[Case]:
    whole = builders.members(sample(own).files["model.keras"])
    model = values(whole, "config.json")
    contents = [*odd_texts(model), *(json.dumps(odd_json(random.Random(seed), model)).encode() for seed in range(300))]
    for content in contents:
        yield instead(own, builders.zipped(whole | {"config.json": content}), refused=False)


INDEX = "model.safetensors.index.json"


@attack("safetensors in shards")
def odd_indices(own: str) -> Iterator[Case]:
    whole = sample(own)
    index = values(whole.files, INDEX)
    for seed in range(500):
        yield instead(own, json.dumps(odd_json(random.Random(seed), index)).encode(), INDEX, refused=False)
    for content in odd_texts(index):
        yield instead(own, content, INDEX, refused=False)
    shards = index["weight_map"]
    first, second = sorted(set(shards.values()))[:2]
    places = [
        "../outside/model.safetensors",
        "..",
        ".",
        "",
        "/",
        "./" + first,
        "x/../" + first,
        "\0",
        first + "\0",
        INDEX,
    ]
    places += [
        "config.json",
        "x" * 5000,
        first.upper(),
        first + " ",
        "..\\" + first,
        "C:" + first,
        "missing.safetensors",
    ]
    for place in places:
        for keys in ([next(iter(shards))], list(shards)):
            odd = index | {"weight_map": shards | dict.fromkeys(keys, place)}
            yield instead(own, json.dumps(odd).encode(), INDEX)
    for odd in (5, None, [], {}, "x", list(shards), [shards], {key: [place] for key, place in shards.items()}):
        yield instead(own, json.dumps({"weight_map": odd}).encode(), INDEX)
    swapped = {key: first if place == second else second if place == first else place for key, place in shards.items()}
    yield instead(own, json.dumps(index | {"weight_map": swapped}).encode(), INDEX)
    twice = json.dumps(index).replace('"weight_map": {', f'"weight_map": {{"{next(iter(shards))}": "x", ')
    yield instead(own, twice.encode(), INDEX, refused=False)
    yield instead(own, b'{"weight_map": {' + b",".join(b'"%d": "%d"' % (n, n) for n in range(50_000)) + b"}}", INDEX)
    yield instead(own, b'{"weight_map": {}, "x": [' + b"0," * 10_000_000 + b"0]}", INDEX)
    yield Case(whole.files | {second: whole.files[first]}, tensors=whole.tensors)
    yield Case({key: value for key, value in whole.files.items() if key != second}, tensors=whole.tensors)
    yield Case({key: value for key, value in whole.files.items() if key == INDEX}, tensors=whole.tensors)


@attack("safetensors in shards")
def links_out_of_the_folder(own: str) -> Iterator[Case]:
    whole = sample(own)
    for shard in (file for file in whole.files if file.endswith(".safetensors")):
        rest = {file: content for file, content in whole.files.items() if file != shard}
        for target in (
            "{outside}/model.safetensors",
            "../outside/model.safetensors",
            "/dev/zero",
            "/dev/stdin",
            shard,
            ".",
        ):
            yield Case(rest, tensors=whole.tensors, links={shard: target})


@attack("orbax")
def links_out_of_a_folder(own: str) -> Iterator[Case]:
    whole = sample(own)
    for file in list(whole.files)[::7]:
        if file != "config.json":
            rest = {other: content for other, content in whole.files.items() if other != file}
            size = len(whole.files[file])
            yield Case(rest | {"../outside/bytes": bytes(size)}, tensors=whole.tensors, links={file: "{outside}/bytes"})
            yield Case(rest, tensors=whole.tensors, links={file: "/dev/zero"})


@attack("safetensors", "safetensors in shards", "torch", "h5", "msgpack", "keras", "npz", "orbax", "fairseq alone")
def no_files(own: str) -> Iterator[Case]:
    """Pipes, in which nothing will ever come, and folders where files should be."""
    whole = sample(own)
    config = {"config.json": whole.files["config.json"]} if "config.json" in whole.files else {}
    for file in [*whole.files, atomic.JOURNAL]:
        rest = {other: content for other, content in whole.files.items() if other != file}
        yield Case(rest, refused=file not in config, tensors=whole.tensors, pipes=(file,))
        yield Case(rest | {f"{file}/x": b""}, refused=file not in config, tensors=whole.tensors)


@attack("safetensors")
def odd_journals(own: str) -> Iterator[Case]:
    whole = sample(own)
    temporary = ".model.safetensors.0123456789abcdef.tmp"
    good = {"rename": {temporary: "model.safetensors"}, "remove": []}
    places = ["../outside/model.safetensors", "..", ".", "", "/etc/passwd", "a/b", "a\\b", "\0", "x" * 300, 5, None, []]
    odd = [{"rename": {temporary: place}, "remove": []} for place in places]
    odd += [{"rename": {place: "model.safetensors"}, "remove": []} for place in places if isinstance(place, str)]
    odd += [{"rename": {}, "remove": [place]} for place in places]
    odd += [{"rename": {}, "remove": [place]} for place in ("notes.txt", ".ssh", "deep", "tokenizer.json")]
    odd += [{"rename": {temporary: place}, "remove": []} for place in ("notes.txt", ".ssh", "deep", "tokenizer.json")]
    odd += [good | {"rename": {}}, good | {"remove": {}}, good | {"x": 1}, {}, [], 5, {"rename": []}, {"remove": []}]
    contents = [*(json.dumps(value).encode() for value in odd), *odd_texts(good)]
    contents += [json.dumps(odd_json(random.Random(seed), good)).encode() for seed in range(200)]
    for content in contents:
        mine = {"notes.txt": b"mine", ".ssh/key": b"mine", "deep/er": b"mine", "tokenizer.json": b"{}"}
        files = whole.files | mine | {atomic.JOURNAL: content, temporary: whole.files["model.safetensors"]}
        yield Case(files, refused=False, tensors=whole.tensors, kept=tuple(mine))
    for link in ("{outside}/model.safetensors", "/dev/zero", ".", atomic.JOURNAL):
        yield Case(whole.files, refused=True, tensors=whole.tensors, links={atomic.JOURNAL: link})
    yield Case(whole.files | {atomic.JOURNAL + "/x": b""}, tensors=whole.tensors)


# ------------------------------------------------------------------ safetensors


def safetensors(header: Any, numbers: bytes, length: int | None = None) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + numbers


@attack("safetensors")
def odd_headers(own: str) -> Iterator[Case]:
    content = sample(own).files[FILES["safetensors"]]
    size = struct.unpack_from("<Q", content)[0]
    header, numbers = json.loads(content[8 : 8 + size]), content[8 + size :]
    for seed in range(600):
        yield instead(own, safetensors(odd_json(random.Random(seed), header), numbers), refused=False)
    for odd in odd_texts(header):
        yield instead(own, safetensors(odd, numbers), refused=False)
    for length in [0, 1, size - 1, size + 1, len(content), len(content) - 8, 100_000_000, 100_000_001, *HUGE]:
        yield instead(own, safetensors(header, numbers, length), refused=length != size)
    first = next(key for key in header if key != "__metadata__")
    shapes = [[2**32, 2**32], [2**63, 2], [-1, -10], [0, 2**62], [1] * 100, [1] * 5000, [5.0, 2], ["5", 2], [True, 2]]
    places = [[0, 2**64], [-8, 8], [8, 0], [0], [0, 0], [4, 44], [0, 40, 80], ["0", "40"], [0.0, 40.0], None]
    changes = [{"shape": shape} for shape in shapes] + [{"data_offsets": place} for place in places]
    changes += [{"shape": shape, "data_offsets": [0, 0]} for shape in shapes]
    changes += [{"dtype": dtype} for dtype in ("F33", "f32", "", "U64", "F8_E4M3", "F4", "C64", "BOOL", "I32", 5, None)]
    for change in changes:
        for key in (first, "odd"):
            yield instead(own, safetensors(header | {key: header[first] | change}, numbers), refused=False)
    twice = json.dumps(header).replace(
        "{", "{" + json.dumps(first) + ': {"dtype":"F32","shape":[],"data_offsets":[0,4]},', 1
    )
    yield instead(own, safetensors(twice.encode(), numbers), refused=False)
    overlapping = {
        key: value if key == "__metadata__" else value | {"data_offsets": [0, 40]} for key, value in header.items()
    }
    yield instead(own, safetensors(overlapping, numbers))
    yield instead(own, safetensors(header, numbers + b"x"))
    yield instead(
        own, safetensors({f"x{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(9999)}, b"")
    )
    for kind in ("tf", "flax", "mlx", "np", "", "paddle"):
        yield instead(own, safetensors(header | {"__metadata__": {"format": kind}}, numbers), refused=False)


# ------------------------------------------------------------------ pickles


def _bytes(data: bytes) -> bytes:
    return b"C" + bytes([len(data)]) + data


RUNNER = name(os.system.__module__, "system")
ARGUMENT = text(COMMAND)
CALLS = {
    "REDUCE": RUNNER + ARGUMENT + b"\x85R",
    "REDUCE of a marked tuple": RUNNER + b"(" + ARGUMENT + b"tR",
    "STACK_GLOBAL": text(os.system.__module__) + text("system") + b"\x93" + ARGUMENT + b"\x85R",
    "INST": b"(" + ARGUMENT + f"i{os.system.__module__}\nsystem\n".encode(),
    "OBJ": b"(" + RUNNER + ARGUMENT + b"o",
    "BUILD of __setstate__": name("types", "SimpleNamespace")
    + b")R}"
    + text("__setstate__")
    + RUNNER
    + b"sb"
    + ARGUMENT
    + b"b",
    "eval": name("builtins", "eval") + text(f"__import__('os').system({COMMAND!r})") + b"\x85R",
    "exec": name("builtins", "exec") + text(f"import os; os.system({COMMAND!r})") + b"\x85R",
    "Python 2": name("__builtin__", "eval") + text(f"__import__('os').system({COMMAND!r})") + b"\x85R",
    "partial": name("functools", "partial") + b"(" + RUNNER + ARGUMENT + b"tR)R",
    "map": name("builtins", "list") + name("builtins", "map") + b"(" + RUNNER + b"](" + ARGUMENT + b"etR\x85R",
    "a pickle within": name("pickle", "loads") + _bytes(RUNNER + ARGUMENT + b"\x85R.") + b"\x85R",
    "memo": RUNNER + b"q\7" + b"0" + b"h\7" + ARGUMENT + b"\x85R",
    "text of the first protocol": RUNNER + b"(S'" + COMMAND.encode() + b"'\ntR",
}
"""Opcodes that run a command, if a machine follows them as Python's does."""

REFUSED_OPCODES = {
    "NEWOBJ": name("subprocess", "Popen") + ARGUMENT + b"\x85\x81",
    "NEWOBJ_EX": name("subprocess", "Popen") + ARGUMENT + b"\x85}\x92",
    "EXT1": b"\x82\x01" + ARGUMENT + b"\x85R",
    "EXT2": b"\x83\x01\x00" + ARGUMENT + b"\x85R",
    "EXT4": b"\x84\x01\x00\x00\x00" + ARGUMENT + b"\x85R",
    "PERSID": b"Pos.system\n",
    "BINPERSID": ARGUMENT + b"Q",
    "BINPERSID of a tuple": b"(" + text("module") + RUNNER + b"tQ",
    "a storage of anything": storage(kind=RUNNER),
    "BUILD of an allowed name": name("collections", "OrderedDict")
    + b")R}"
    + text("__setstate__")
    + RUNNER
    + b"sb"
    + ARGUMENT
    + b"b",
    "BUILD of a class": name("collections", "OrderedDict") + b"}" + text("items") + b"K\1sb",
    "BUILD of a function": name("torch._utils", "_rebuild_tensor_v2") + b"}" + text("x") + b"K\1sb",
    "BUILD of a storage type": name("torch", "FloatStorage") + b"}" + text("dtype") + b"K\1sb",
    "BUILD with slots": name("argparse", "Namespace") + b")\x81N}" + text("x") + b"K\1s\x86b",
    "BUILD of a number": b"K\1}b",
    "a call of a value": b"K\1)R",
    "a call of a dict": b"})R",
    "a call of a storage type": name("torch", "FloatStorage") + b")R",
    "sets": b"\x8f(K\1\x90",
    "frozen sets": b"(K\1\x91",
    "DUP": b"K\x012\x86",
    "byte arrays": b"\x96" + struct.pack("<Q", 4) + b"abcd",
    "buffers": b"\x97",
    "read-only buffers": b"\x98",
    "PUT of the first protocol": b"K\1p99999999999\n",
    "GET of the first protocol": b"K\1p0\n0g0\n",
    "an unknown opcode": b"\xff",
}
REFUSED_NAMES = """
argparse: FileType Namespace.__class__
bdb: Bdb.run
builtins: getattr __import__ compile open breakpoint input type object
cProfile: run
code: InteractiveConsole
collections: OrderedDict.fromkeys defaultdict
copy_reg: _reconstructor
copyreg: _reconstructor add_extension
ctypes: CDLL
importlib: import_module
marshal: loads
nt: system
numpy: load dtype
numpy.core.multiarray: _reconstruct scalar
operator: attrgetter methodcaller
pathlib: Path.unlink
pickle: Unpickler
pty: spawn
roberta_pln.checkpoint: open
roberta_pln.checkpoint.plain_pickle: os.system
runpy: run_path
shutil: rmtree
socket: socket
subprocess: run
timeit: timeit
torch: load ops FloatTensor FloatStorage.__class__ UntypedStorage _utils._rebuild_tensor_v2
torch._tensor: _rebuild_from_type_v2
torch._utils: _rebuild_tensor _rebuild_sparse_tensor _rebuild_qtensor _rebuild_device_tensor_from_numpy
torch._utils: _rebuild_meta_tensor_no_storage _rebuild_wrapper_subclass _rebuild_parameter_with_state
torch._utils: _import_dotted_name _rebuild_nested_tensor _rebuild_xla_tensor __builtins__ importlib.import_module
torch.hub: load
torch.jit._pickle: restore_type_tag
torch.serialization: load
torch.storage: _load_from_bytes
types: CodeType FunctionType
webbrowser: open
_pickle: loads
__main__: x
"""
NAMES = [
    (module, attribute)
    for module, attributes in (line.split(": ") for line in REFUSED_NAMES.strip().splitlines())
    for attribute in attributes.split()
]
NAMES += [
    ("", ""),
    ("torch", ""),
    ("collections ", "OrderedDict"),
    ("collections", "OrderedDict\r"),
    ("collections", "\u041erderedDict"),  # with a Cyrillic letter
    ("x" * 9999, "y"),
]


def bombs() -> dict[str, bytes]:
    """Opcodes that would take memory or time far beyond their number, or crash."""
    many = 100_000
    doubled = b"]q\0" + b"".join(b"(h%ch%ctq%c" % (n, n, n + 1) for n in range(60))
    deep = b")" + b"\x85" * (10 * many)
    rebuild = name("torch._utils", "_rebuild_tensor_v2") + b"("
    items = b"".join(b"J" + struct.pack("<i", n) + b"K\1" for n in range(many))
    return {
        "LONG_BINPUT": b"K\1r" + struct.pack("<I", 2**31 - 1),
        "LONG_BINPUT, 500 million": b"K\1r" + struct.pack("<I", 5 * 10**8),
        **{f"BYTEARRAY8 of {size}": b"\x96" + struct.pack("<Q", size) for size in HUGE},
        **{f"BINBYTES8 of {size}": b"\x8e" + struct.pack("<Q", size) for size in HUGE},
        **{f"BINUNICODE8 of {size}": b"\x8d" + struct.pack("<Q", size) for size in HUGE},
        **{f"FRAME of {size}": b"\x95" + struct.pack("<Q", size) + b"\xff" for size in HUGE},
        "BINUNICODE": b"X\xff\xff\xff\xff",
        "BINBYTES": b"B\xff\xff\xff\xff",
        "LONG4": b"\x8b\xff\xff\xff\x7f",
        "LONG4, negative": b"\x8b\xff\xff\xff\xff",
        "BINSTRING, negative": b"T\xff\xff\xff\xff",
        "deep tuples": b")" + b"\x85" * many,
        "deep tuples as a key": b"}" + deep + b"K\1s",
        "deep tuples as a name": storage(key=deep),
        "deep lists": b"]" * many + b"a" * (many - 1),
        "deep dicts": b"}" * 1 + (b"K\1}") * many + b"s" * many,
        "deep marks": b"(" * many + b"t" * many,
        "a list in itself": b"]q\0h\0a",
        "a dict in itself": b"}q\0K\1h\0s",
        "doubled lists": doubled,
        "doubled lists as a name": doubled + b"Q",
        "doubled lists as a key": b"}" + doubled + b"K\1s",
        "doubled lists as a shape": rebuild + storage() + b"K\0" + doubled + b"h\1K\0tR",
        "doubled lists as a size": rebuild + storage() + doubled + b")))tR",
        "one large tuple, used often": b"(" + b"K\1" * many + b"tq\0" + (b"h\0Q0") * many,
        "one large state, used often": b"}(" + items + b"uq\0" + (name("argparse", "Namespace") + b")\x81h\0b") * 1000,
        "one large list, used often": b"](" + b"](K\1K\1e" * many + b"e\x85q\0"
        + (name("collections", "OrderedDict") + b"h\0R") * 1000,
        "many axes": tensor(shape=b"(" + b"K\1" * many + b"tq\0", strides=b"h\0"),
    }  # fmt: skip


def broken() -> dict[str, bytes]:
    """Streams that end, or take what is not there."""
    return {
        "nothing": b"",
        "STOP alone": b".",
        "no STOP": b"\x80\x02}",
        "POP of nothing": b"0",
        "TUPLE3 of nothing": b"\x87.",
        "TUPLE without a mark": b"t.",
        "APPEND to nothing": b"K\1a.",
        "APPEND to a number": b"K\1K\1a.",
        "SETITEM to nothing": b"K\1s.",
        "SETITEM to a list": b"]K\1K\1s.",
        "SETITEMS of one": b"}(K\1u.",
        "an unhashable key": b"}]K\1s.",
        "BINGET of nothing": b"h\5.",
        "MEMOIZE of nothing": b"\x94.",
        "a name without end": b"ctorch",
        "a name without attribute": b"ctorch\n",
        "text that is none": b"X\2\0\0\0\xff\xff.",
        "protocol 255": b"\x80\xff}.",
        "a number as the whole": b"K\1.",
        "a tensor as the whole": tensor() + b".",
    }


def tensors() -> dict[str, bytes]:
    """Tensors that are none, or that reach beyond their numbers."""
    sizes = [
        b"K\0",
        b"K\1",
        b"K\x0b",
        b"K\xff",
        *map(number, (-1, 2**31, 2**63, 2**200)),
        b"N",
        b"\x88",
        text("2"),
        b")",
    ]
    sizes += [b"G" + struct.pack(">d", value) for value in (2.0, float("nan"))] + [b"]"]
    found = {f"size {size!r}": tensor(storage(size=size)) for size in sizes if size != b"K\x0a"}
    found |= {f"offset {size!r}": tensor(offset=size) for size in sizes if size != b"K\0"}
    found |= {f"shape {size!r}": tensor(shape=b"(K\5" + size + b"t") for size in sizes}
    found |= {f"stride {size!r}": tensor(strides=b"(K\2" + size + b"t") for size in sizes if size != b"K\1"}
    kinds = ["DoubleStorage", "HalfStorage", "BFloat16Storage", "LongStorage", "BoolStorage", "ByteStorage"]
    found |= {f"type {kind}": tensor(storage(kind=name("torch", kind))) for kind in kinds}
    keys = ["", "1", "../0", "/etc/passwd", "0\0", "x" * 5000, "data.pkl", "byteorder"]
    found |= {f"key {key[:20]!r}": tensor(storage(key=text(key))) for key in keys}
    found |= {
        "key number": tensor(storage(key=b"K\0")),
        "no storage": tensor(b"N"),
        "storage of another form": tensor(b"(" + text("storage") + b"NtQ"),
        "view of a storage": tensor(
            b"(" + text("storage") + name("torch", "FloatStorage") + text("0") + text("cpu") + b"K\x0a(K\1K\1ttQ"
        ),
        "missing arguments": name("torch._utils", "_rebuild_tensor_v2") + b")R",
        "many arguments": tensor(rest=b"\x89" * 1000),
        "wide strides": tensor(strides=b"(" + number(2**62) + b"K\1t"),
        "same numbers twice": tensor(shape=b"(K\5K\2t", strides=b"(K\1K\1t"),
        "one number for all": tensor(shape=b"(K\5K\2t", strides=b"(K\0K\0t"),
        "other axes": tensor(strides=b"(K\1t"),
        "lists": tensor(shape=b"](K\5K\2e"),
        "huge and empty": tensor(shape=b"(K\0" + number(2**62) + b"t", strides=b"(K\1K\1t"),
        "a parameter of anything": name("torch._utils", "_rebuild_parameter") + b"(K\1\x88)tR",
        "a parameter of nothing": name("torch._utils", "_rebuild_parameter") + b")R",
        "no tensor": b"K\1",
        "a name": name("torch", "FloatStorage"),
        "nested": b"}" + text("x") + tensor() + b"s",
    }
    return found


WORDS = "roberta_prelayernorm.embeddings.word_embeddings.weight"


def spliced(pickled: bytes, value: bytes, key: bytes = text("odd")) -> bytes:
    """The pickle of a dict with one item more."""
    assert pickled.endswith(b"u.")
    return pickled[:-2] + key + value + b"u."


def in_zip(own: str, pickled: bytes, **changes: bytes) -> bytes:
    whole = builders.members(sample(own).files[sample(own).weights[0]])
    stem = next(iter(whole)).partition("/")[0]
    return builders.zipped(
        whole | {f"{stem}/data.pkl": pickled} | {f"{stem}/{key}": data for key, data in changes.items()}
    )


@attack("torch", "torch before 1.6", "fairseq alone")
def pickles(own: str) -> Iterator[Case]:
    archive = sample("torch" if own == "torch before 1.6" else own)
    whole = builders.members(archive.files[archive.weights[0]])
    pickled = next(data for key, data in whole.items() if key.endswith("data.pkl"))
    named = {f"name {module}.{attribute}": name(module, attribute) + b")R" for module, attribute in NAMES}
    light = CALLS | REFUSED_OPCODES | named | tensors()
    items = light | bombs()
    streams = {key: spliced(pickled, value) for key, value in items.items()}
    streams |= {f"{key}, for the words": spliced(pickled, value, text(WORDS)) for key, value in tensors().items()}
    if own == "torch":  # the others begin as it does
        streams |= {f"{key}, alone": b"\x80\x02" + value + b"." for key, value in light.items()}
        streams |= {f"{key}, as a key": spliced(pickled, b"K\1", key=value) for key, value in (CALLS | bombs()).items()}
        streams |= {f"{key}, protocol 4": b"\x80\x04" + spliced(pickled, value)[2:] for key, value in CALLS.items()}
    streams |= broken()
    for key, stream in streams.items():
        if own == "torch before 1.6":
            numbers = sample(own).files[FILES["torch"]].partition(pickled)[2]
            content = builders.LEGACY_START + stream + numbers
        else:
            content = in_zip(own, stream)
        # What is another form of the same, or has more tensors than are asked for, may open.
        must = key in CALLS | REFUSED_OPCODES or key.startswith(("name", "BYTEARRAY8"))
        yield instead(own, content, refused=must)


@attack("fairseq alone")
def odd_settings(own: str) -> Iterator[Case]:
    """Settings are given twice; the later ones count."""
    whole = sample(own)
    members = builders.members(whole.files[whole.weights[0]])
    pickled = next(data for key, data in members.items() if key.endswith("data.pkl"))
    settings = builders.plain(pickled)["cfg"]
    odd = [odd_json(random.Random(seed), settings) for seed in range(300)]
    odd += [
        settings | {"model": settings["model"] | {key: value}} for key in settings["model"] for value in ODD_VALUES[::4]
    ]
    for value in odd + ODD_VALUES:
        for key in ("cfg", "args"):
            opcodes = pickle.dumps(value, 2)[2:-1]
            yield instead(own, in_zip(own, spliced(pickled, opcodes, text(key))), refused=False)
    for key in (
        "model",
        "args",
        "cfg",
        "extra_state",
        "last_optimizer_state",
        "task_state",
        "criterion",
        "optimizer_history",
    ):
        for value in ODD_VALUES[::2]:
            yield instead(own, in_zip(own, spliced(pickled, pickle.dumps(value, 2)[2:-1], text(key))), refused=False)


@attack("torch", "torch before 1.6")
def exchanged_storages(own: str) -> Iterator[Case]:
    """Names of storages that are others, in a pickle whose checksum, if there is one, stays as it was."""
    content = sample(own).files[FILES["torch"]]
    for first in range(len(sample(own).tensors) - 1):
        one, other = text(str(first)), text(str(first + 1))
        if len(one) == len(other) and content.count(one) == content.count(other) == 1 + (own != "torch"):
            exchanged = content.replace(one, b"?" * len(one)).replace(other, one).replace(b"?" * len(one), other)
            yield instead(own, exchanged, refused=own == "torch")
            yield instead(own, content.replace(one, other))


@attack("torch before 1.6")
def broken_starts(own: str) -> Iterator[Case]:
    content = sample(own).files[FILES["torch"]]
    rest = content.removeprefix(builders.LEGACY_START)
    yield instead(own, b"\x80\x02}" + text("little_endian") + b"\x88" + b"s." + rest)
    attacks = CALLS | REFUSED_OPCODES
    for value in attacks.values():
        yield instead(own, b"\x80\x02" + value + b"." + content)
    for value in (attacks | bombs()).values():
        yield instead(own, content[: -len(rest)] + rest.replace(b"e.", value + b"e.", 1), refused=False)
    for size in HUGE:
        at = content.rindex(b"e.") + 2
        yield instead(own, patched(content, at, "<Q", size))


# ------------------------------------------------------------------ zip files


@attack("torch", "npz", "keras archive", "fairseq")
def zip_tricks(own: str) -> Iterator[Case]:
    whole = sample(own)
    content = whole.files[whole.weights[0]]
    members = builders.members(content)
    places = builders.headers(content)
    for key in [*members][:: max(1, len(members) // 2)]:
        for table, start in zip((builders.LOCAL, builders.CENTRAL), places[key], strict=True):
            for field, at in table.items():
                yield from extremes(own, content, start + at, field)
    end = content.rindex(b"PK\5\6")
    for field, at in builders.END.items():
        yield from extremes(own, content, end + at, field)
    for (_, first), (second, _) in pairwise(places.values()):  # one member where another is
        yield instead(own, patched(content, first + 42, "<I", second))
    for compression in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        yield instead(own, builders.zipped(members, compression))
    main = next(key for key in members if key.endswith((".pkl", ".h5", ".npy")))
    bomb = {**members, main: bytes(50_000_000)}
    yield instead(own, builders.zipped(bomb, zipfile.ZIP_DEFLATED))
    yield instead(own, content + b"x" * 10, refused=False)
    yield instead(own, b"x" * 10 + content, refused=False)
    yield instead(own, content + content, refused=False)
    large = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 2**63, 2**63, 2**63, 2**63)
    yield instead(
        own, content[:end] + large + struct.pack("<4sIQI", b"PK\6\7", 0, end, 1) + content[end:], refused=False
    )
    yield instead(own, builders.zipped({}))
    yield instead(own, builders.zipped(dict.fromkeys(members, b"")))
    odd_names = [
        "../x",
        "/x",
        "C:\\x",
        "x" * 60_000,
        "\0",
        "a\\b",
        "é",
        "..",
        "data/",
        "other/data.pkl",
        "x.npy",
        "../../x.npy",
    ]
    for odd in odd_names:
        renamed = {odd if key == main else key: data for key, data in members.items()}
        yield instead(own, builders.zipped({**members, odd: b"x"}), refused=False)
        yield instead(own, builders.zipped(renamed), refused=False)
    for key in list(members)[:5]:
        fewer = {other: data for other, data in members.items() if other != key}
        yield instead(own, builders.zipped(fewer), refused=False)
        yield instead(own, builders.zipped_twice(members, key))


def extremes(own: str, content: bytes, at: int, field: str) -> Iterator[Case]:
    """A field of a zip file with numbers that are none."""
    form = "<I" if field in builders.FOUR_BYTES else "<H"
    (old,) = struct.unpack_from(form, content, at)
    for new in {0, 1, old + 1, old - 1, old ^ 8, old ^ 1, 0xFFFF, 0xFFFFFFFF, 0x7FFFFFFF, len(content)}:
        yield instead(own, patched(content, at, form, new), refused=False)


@attack("npz")
def odd_arrays(own: str) -> Iterator[Case]:
    members = builders.members(sample(own).files[FILES["npz"]])
    key = next(key for key in members if "word_embeddings" in key)
    numbers = members[key][-40:]
    make = builders.array_header
    shapes = [(-5, -2), (5, -2), (2**62, 2), (2**63, 2**63), (5, 2, 0), (5.0, 2), ("5", 2), (True, 10), (10,), None, 10]
    shapes += [(5, 2) + (1,) * 70, [5, 2], ((5,), 2), (5, 2, 2**64)]
    descrs = ["|O", "<i4", ">f4", "<f8", "V4", "|S4", "<U1", "<M8[s]", "x", "", None, 5, "<f4" * 99, "<f99999999999"]
    descrs += [[("a", "<f4")], [("a", "<f4", (2**40,))], ("<f4", (2,))]
    good, call = make((5, 2)), f"__import__('os').system({COMMAND!r})"
    headers: list[Any] = [make(shape) for shape in shapes] + [make((5, 2), descr) for descr in descrs]
    headers += [make((5, 2), fortran=value) for value in (None, 1, "x", [])]
    headers += ["", "{", "{}", "None", "5", "{'descr': '<f4'}", "\0" * 99, "é" * 9, b"\xff" * 9, call]
    headers += ["(" * 9000, "[" * 200 + "]" * 200, "-" * 9000 + "1", "9" * 9000, "{" + "'a':{" * 80 + "}" * 81]
    headers += [good.replace("5", odd) for odd in ("5L", "4+1", call)] + [good.replace("(5, 2)", "(5,) + (2,)")]
    headers += [good + " " * 20_000, good.replace("}", ", 'x': 1}"), good.replace("{", "{'shape': (1,), ")]
    odd = [builders.npy(header, numbers) for header in headers]
    odd += [builders.npy(good, numbers, version) for version in ((0, 0), (1, 1), (2, 0), (3, 0), (9, 9))]
    odd += [builders.npy(good, numbers, (2, 0), size) for size in (0, 1, 2**16, 2**31, 2**32 - 1)]
    odd += [builders.npy(make((1,), "|O"), b"\x80\x02" + value + b".") for value in CALLS.values()]
    odd += [
        builders.npy(good, numbers + b"x"),
        builders.npy(good, numbers[:-1]),
        b"",
        b"\x93NUMPY",
        numbers,
    ]
    for content in odd:
        yield instead(own, builders.zipped({**members, key: content}), refused=False)
    for value in CALLS.values():
        yield instead(own, b"\x80\x02" + value + b".")
        yield instead(
            own, builders.zipped({**members, "odd.npy": builders.npy(make((1,), "|O"), b"\x80\x02" + value + b".")})
        )


# ------------------------------------------------------------------ MessagePack


@attack("msgpack")
def odd_maps(own: str) -> Iterator[Case]:
    content = sample(own).files[FILES["msgpack"]]
    pack, raw, extension = builders.pack, builders.raw, builders.extension

    def array(
        shape: Any = (2, 5), dtype: Any = "float32", data: bytes = builders.floats(10), count: int = 3, kind: int = 1
    ) -> bytes:
        return extension(pack([list(shape) if isinstance(shape, tuple) else shape, dtype, raw(data)][:count]), kind)

    good = array()
    leaves = [
        array(shape)
        for shape in [
            (-2, -5),
            (2**62, 2),
            (2**64 - 1,) * 2,
            (0, 2**63),
            (10,),
            (),
            (1,) * 100 + (10,),
            (2**64 - 1,) * 100_000,
            5,
            "x",
        ]
    ]
    leaves += [
        array(dtype=dtype)
        for dtype in ("object", "float99", "", "int32", "bfloat16", "<f4", "x" * 9999, 5, [], b"\xc0", b"\xc3")
    ]
    leaves += [array(data=data) for data in (b"", b"x", builders.floats(9), builders.floats(11))]
    leaves += [array(count=count) for count in (0, 1, 2)] + [array(kind=kind) for kind in (0, 2, 3, 127, 128, 255)]
    leaves += [extension(good[6:], size=size) for size in (0, 1, len(good) - 7, len(good) - 5, *HUGE[:3])]
    leaves += [
        b"\xc6\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\1",
    ]
    leaves += [
        b"\xc0",
        b"\xc1",
        b"\xc2",
        b"\xca\0\0\0\0",
        b"\xcb" + struct.pack(">d", float("nan")),
        b"\xd3" + b"\xff" * 8,
        pack(5),
        pack("x"),
        raw(b"x"),
        pack([1]),
    ]
    leaves += [code + bytes(30) for code in (b"\xd4", b"\xd5", b"\xd6", b"\xd7", b"\xd8")]
    leaves += [
        pack({}),
        pack({"__msgpack_chunked_array__": b"\xc3", "shape": {"0": 2}, "chunks": {"0": good}}),
        pack({"x": pack({"y": good})}),
    ]
    leaves += [b"\x81\xa1x" * depth + good for depth in (31, 32, 33, 1000, builders.DEEP)] + [
        b"\x91" * builders.DEEP,
        b"\x81" * builders.DEEP,
    ]
    for leaf in leaves:
        yield instead(own, content[:1] + pack("odd") + leaf + content[1:], refused=False)
        yield instead(own, bytes([content[0] + 1]) + pack("odd") + leaf + content[1:], refused=False)
        yield instead(
            own, pack({"roberta_prelayernorm": {"embeddings": {"word_embeddings": {"embedding": leaf}}}}), refused=False
        )
    keys = [
        "",
        "/",
        "a/b",
        "..",
        "\0",
        "x" * 9999,
        "lm_head",
        "lm_head/bias",
        "roberta_prelayernorm",
        "é",
        b"\xa2\xff\xfe",
        b"\xa1\xff",
        pack(1),
        b"\xc0",
        good,
    ]
    for key in keys:
        yield instead(own, bytes([content[0] + 1]) + pack(key) + good + content[1:], refused=False)
        yield instead(own, bytes([content[0] + 2]) + 2 * (pack(key) + good) + content[1:])
    for tail in (b"\xc0", content, b"x" * 100):
        yield instead(own, content + tail)
    yield instead(own, b"\xde\xff\xff" + content[1:])
    yield instead(own, pack({str(n): {} for n in range(50_000)}))


# ------------------------------------------------------------------ HDF5


def h5_changes(words: str) -> dict[str, Any]:
    """Changes of a file with h5py: what each does with the dataset at a place."""
    import h5py

    zeros = np.zeros((5, 2), np.float32)

    def place(file: Any) -> Any:
        parent, _, own = words.rpartition("/")
        del file[words]
        return file[parent], own

    def put(file: Any, value: Any) -> None:
        group, own = place(file)
        group[own] = value

    def make(file: Any, *arguments: Any, **options: Any) -> None:
        group, own = place(file)
        group.create_dataset(own, *arguments, **options)

    def one_for_two(file: Any) -> None:
        same: list[Any] = []
        file.visititems(lambda _, node: same.append(node) if getattr(node, "shape", None) == (2, 2) else None)
        parent, own = same[0].parent, same[0].name.rpartition("/")[2]
        del parent[own]
        parent[own] = same[1]

    def virtual(file: Any, folder: Any) -> None:
        layout = h5py.VirtualLayout((5, 2), np.float32)
        layout[:] = h5py.VirtualSource("../outside/other.h5", "x", (5, 2))
        group, own = place(file)
        group.create_virtual_dataset(own, layout)

    def of_named_type(file: Any, _: Any) -> None:
        file["kind"] = np.dtype("<f4")
        group, own = place(file)
        h5py.h5d.create(group.id, own.encode(), file["kind"].id, h5py.h5s.create_simple((5, 2)))

    types: list[Any] = ["<i4", ">f4", "<f8", "S4", "V4", "V2", "?", "<c8", [("a", "<f4"), ("b", "<f4")], ("<f4", (2,))]
    types += [h5py.vlen_dtype(np.float32), h5py.ref_dtype, h5py.regionref_dtype, h5py.string_dtype()]
    types += [h5py.enum_dtype({"a": 1})]
    changes = {f"type {kind}": lambda file, _, kind=kind: make(file, (5, 2), dtype=kind) for kind in types}
    filters = [{"compression": "gzip"}, {"compression": "lzf"}, {"shuffle": True}, {"fletcher32": True}]
    filters += [{"scaleoffset": 3}, {"chunks": (1, 1)}, {"maxshape": (None, 2)}]
    changes |= {f"{options}": lambda file, _, options=options: make(file, data=zeros, **options) for options in filters}
    changes |= {
        f"shape {shape}": lambda file, _, shape=shape: make(file, shape, np.float32)
        for shape in [(2**40, 2**19), (2**60,), (0, 2**62), (), (1,) * 32]
    }
    outside = {"external": [("../outside/model.safetensors", 0, 40)]}
    bomb = {"shape": (10**6, 10**3), "chunks": (10**3, 10**3), "compression": "gzip", "fillvalue": 1.0}
    other = words.replace("word", "position").replace("weight:0", "embeddings:0")
    return changes | {
        "soft link": lambda file, _: put(file, h5py.SoftLink("/x")),
        "soft link to itself": lambda file, _: put(file, h5py.SoftLink("/" + words)),
        "external link": lambda file, _: put(file, h5py.ExternalLink("../outside/other.h5", "x")),
        "external link to a device": lambda file, _: put(file, h5py.ExternalLink("/dev/zero", "x")),
        "external storage": lambda file, _: make(file, (5, 2), np.float32, **outside),
        "virtual": virtual,
        "never written": lambda file, _: make(file, (5, 2), np.float32, chunks=(1, 1)),
        "bomb": lambda file, _: make(file, dtype=np.float32, **bomb),
        "none": lambda file, _: put(file, h5py.Empty("f")),
        "text": lambda file, _: put(file, "text"),
        "named type": lambda file, _: put(file, np.dtype("<f4")),
        "of a named type": of_named_type,
        "group": lambda file, _: place(file)[0].create_group(words.rpartition("/")[2]),
        "circle": lambda file, _: put(file, file["/"]),
        "circle of groups": lambda file, _: file[words.rpartition("/")[0]].__setitem__("up", file["/"]),
        "another": lambda file, _: put(file, file[other]),
        "one for two": lambda file, _: one_for_two(file),
        "absent": lambda file, _: place(file),
        "many attributes": lambda file, _: file.attrs.update({f"a{n}": n for n in range(50)}),
    }


def names_changes() -> dict[str, Any]:
    """Changes of the attributes by which Keras 2 finds its tensors."""
    import h5py

    def set_names(group: str, value: Any, key: str = "") -> Any:
        def change(file: Any, _: Any) -> None:
            file[group].attrs[key or ("layer_names" if group == "/" else "weight_names")] = value

        return change

    odd: list[Any] = [
        ["../x"],
        ["/"],
        [""],
        ["."],
        ["lm_head/.."],
        ["x" * 9999],
        ["lm_head"] * 2000,
        [b"\xff"],
        5,
        "lm_head",
    ]
    odd += [
        np.arange(3),
        np.zeros(0),
        ["lm_head", "nowhere"],
        ["lm_head//bias"],
        np.zeros((2, 2), "S5"),
        np.zeros(3, "V3"),
    ]
    odd += [np.array([(1, 2)], "i4,i4"), h5py.Empty("S5"), np.array(["lm_head"], h5py.string_dtype(length=40))]
    return {
        f"{group} {value!r:.40}": set_names(group, value)
        for group in ("/", "lm_head", "roberta_prelayernorm")
        for value in odd
    }


@attack("h5", "h5 since 1.8", "keras")
def moved_tensors(own: str) -> Iterator[Case]:
    """Addresses of tensors that lead elsewhere."""
    file = sample(own).weights[0]
    content = sample(own).files[file]
    unused = [content.find(bytes(size)) for size in (40, 64, 200)]
    for _, start, end, _ in pieces(own).values():
        for place in [start - 1, start + 1, start + 8, start + 64, 0, 8, 96, len(content) - (end - start), *unused]:
            moved = content.replace(start.to_bytes(8, "little"), place.to_bytes(8, "little"))
            yield replace(instead(own, moved, refused=False), zeros=own in WITHOUT_CHECKSUMS)


@attack("h5", "h5 since 1.8")
def h5_tricks(own: str) -> Iterator[Case]:
    content = sample(own).files[FILES["h5"]]
    model = "roberta_prelayernorm/tf_roberta_pre_layer_norm_for_masked_lm/roberta_prelayernorm"
    for change in h5_changes(f"{model}/embeddings/word_embeddings/weight:0").values():
        yield instead(own, builders.h5(change, content), refused=False)
    for change in names_changes().values():
        yield instead(own, builders.h5(change, content), refused=False)
    yield from h5_wholes(own, content)


@attack("keras")
def keras_tricks(own: str) -> Iterator[Case]:
    content = sample(own).files[FILES["keras"]]
    for change in h5_changes("layers/roberta_pre_layer_norm_model/embeddings/word_embeddings/vars/0").values():
        yield instead(own, builders.h5(change, content), refused=False)
    yield from h5_wholes(own, content)


def h5_wholes(own: str, content: bytes) -> Iterator[Case]:
    """Files in which something is before, or nothing is in."""
    for size in (512, 1024, 4096):
        yield instead(own, bytes(size) + content)
    yield instead(own, builders.h5(lambda file, _: None))
    yield instead(own, builders.h5(lambda file, _: file.create_dataset("x", data=1.0), userblock_size=512))
    yield instead(own, builders.h5(lambda file, _: [file.create_group(str(n)) for n in range(3000)]))
    yield instead(own, content[:8] + b"\xff" * 88 + content[96:])
    yield instead(own, content[:96])


# ------------------------------------------------------------------ Orbax


METADATA = "orbax/_METADATA"


@attack("orbax")
def odd_folders(own: str) -> Iterator[Case]:
    whole = sample(own)
    metadata = values(whole.files, METADATA)
    for seed in range(400):
        yield instead(own, json.dumps(odd_json(random.Random(seed), metadata)).encode(), METADATA, refused=False)
    for content in odd_texts(metadata):
        yield instead(own, content, METADATA, refused=False)
    header = next(file for file in whole.files if "word_embeddings" in file and file.endswith(".zarray"))
    array = values(whole.files, header)
    changes: list[dict[str, Any]] = [{key: value} for key in array for value in ODD_VALUES]
    changes += [
        {"shape": shape, "chunks": shape}
        for shape in ([2**62, 2**62], [-5, -2], [0], [], [1] * 500, [2**40], [5.0, 2.0], ["5", "2"], [True, 10])
    ]
    changes += [{"dimension_separator": text_} for text_ in ("/", "/../", "/../../outside/", "", "\0", "../", "//")]
    changes += [{"dtype": dtype} for dtype in ("|O", "|V4", "<U4", "<f8", "<i4", [["a", "<f4"]])]
    changes += [{"compressor": {"id": kind}} for kind in ("zlib", "blosc", "zstd", "bz2", "pickle", "../x", "")]
    changes += [{"filters": [{"id": kind}]} for kind in ("pickle", "json2", "delta")]
    changes += [{"zarr_format": version} for version in (1, 3, "2")]
    for change in changes:
        yield instead(own, json.dumps(array | change).encode(), header, refused=False)
    for content in odd_texts(array):
        yield instead(own, content, header, refused=False)
    for key in ("..", ".", "../outside", "/", "\0", "a/b", "x" * 300, "C:", "é"):
        odd = json.loads(json.dumps(metadata))
        first = next(iter(odd["tree_metadata"].values()))
        for steps in ([key], [key, "x"], ["params", key]):
            first["key_metadata"] = [{"key": step, "key_type": 2} for step in steps]
            yield instead(own, json.dumps(odd).encode(), METADATA, refused=False)
    for extra in ("orbax/manifest.ocdbt", "orbax/d/x", "orbax/zarr.json"):
        yield Case(whole.files | {extra: b"x" * 100}, refused=False, tensors=whole.tensors)
    for removed in list(whole.files)[::5]:
        rest = {file: content for file, content in whole.files.items() if file != removed}
        yield Case(rest, refused=False, tensors=whole.tensors)
