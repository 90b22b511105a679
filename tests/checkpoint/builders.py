"""Bytes of the formats, put together by hand, so that they can be wrong."""

from __future__ import annotations

import json
import pickle
import random
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

# ------------------------------------------------------------------ JSON

DEEP = 100_000
ODD_VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 2, 31, 2**31, 2**63, 2**64, 10**30, 0.5, -0.5, 1e308, float("nan"), float("inf"),
    "", "x", "1", "..", ".", "/", "../outside", "/etc/passwd", "a/b", "a\\b", "\0", "é" * 50, "x" * 5000,
    [], {}, [[]], {"a": {}}, [0] * 500, [None], [-1], [2**62, 2**62], ["x"], {"0": 0}, {"x": [1]}, {"-1": [0]},
]  # fmt: skip


def odd_json(rng: random.Random, value: Any) -> Any:
    """A JSON value with something changed somewhere."""
    if isinstance(value, dict | list) and value and rng.random() < 0.8:
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        changed = value.copy()
        match rng.choice(["within", "within", "within", "without", "twice", "renamed"]):
            case "without":
                del changed[key]
            case "twice" if isinstance(value, list):
                changed.append(value[key])
            case "renamed" if isinstance(value, dict):
                changed[str(rng.choice(ODD_VALUES))[:100]] = changed.pop(key)
            case _:
                changed[key] = odd_json(rng, value[key])
        return changed
    return rng.choice(ODD_VALUES)


def odd_texts(value: Any) -> list[bytes]:
    """What is no JSON, or JSON that hurts."""
    text = json.dumps(value)
    return [
        b"",
        b" ",
        b"null",
        b"[]",
        b"5",
        b'"x"',
        b"\xff\xfe" + text.encode("utf-16-le"),
        b"\xef\xbb\xbf" + text.encode(),
        b"\xff" + text.encode(),
        text.encode() + b"}",
        text.encode() + b"\0",
        text[:-1].encode(),
        b"[" * DEEP,
        b'{"a":' * DEEP,
        b'{"a":' * DEEP + b"1" + b"}" * DEEP,
        b'{"num_hidden_layers":' + b"9" * 5000 + b"}",
        b'{"layer_norm_eps":' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"\\ud800": "\\udfff", ' + text[1:].encode(),
        text.replace(":", ": " + " " * 100_000, 1).encode(),
    ]


# ------------------------------------------------------------------ zip files


def zipped(members: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    return file.getvalue()


def zipped_twice(members: Mapping[str, bytes], name: str) -> bytes:
    """A zip file with one member once more, of another content."""
    file = BytesIO(zipped(members))
    with warnings.catch_warnings(), zipfile.ZipFile(file, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr(zipfile.ZipInfo(name), members[name][::-1])
    return file.getvalue()


def members(archive: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(BytesIO(archive)) as file:
        return {name: file.read(name) for name in file.namelist()}


LOCAL = {"version": 4, "flags": 6, "method": 8, "crc": 14, "packed": 18, "size": 22, "name_size": 26, "extra_size": 28}
CENTRAL = {
    "flags": 8, "method": 10, "crc": 16, "packed": 20, "size": 24, "name_size": 28, "extra_size": 30,
    "comment_size": 32, "disk": 34, "place": 42,
}  # fmt: skip
FOUR_BYTES = ("crc", "packed", "size", "place")
END = {"disk": 4, "entries_here": 8, "entries": 10, "size": 12, "place": 16, "comment_size": 20}
"""Where in a local header, in an entry of the directory, and in the end of a zip file each field is."""


def headers(archive: bytes) -> dict[str, tuple[int, int]]:
    """Where the local header and the entry of the directory of each member are."""
    with zipfile.ZipFile(BytesIO(archive)) as file:
        found, at = {}, file.start_dir
        for entry in file.infolist():
            found[entry.filename] = entry.header_offset, at
            at += 46 + sum(struct.unpack_from("<HHH", archive, at + 28))
    return found


def patched(content: bytes, at: int, form: str, value: int) -> bytes:
    size = struct.calcsize(form)
    return content[:at] + struct.pack(form, value % 256**size) + content[at + size :]


# ------------------------------------------------------------------ pickles


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode("utf-8", "surrogatepass")


def storage(key: bytes = text("0"), size: bytes = number(10), kind: bytes = name("torch", "FloatStorage")) -> bytes:
    return b"(" + text("storage") + kind + key + text("cpu") + size + b"tQ"


def tensor(
    place: bytes = b"",
    offset: bytes = b"K\0",
    shape: bytes = b"(K\5K\2t",
    strides: bytes = b"(K\2K\1t",
    rest: bytes = b"\x89)",
) -> bytes:
    return (
        name("torch._utils", "_rebuild_tensor_v2")
        + b"("
        + (place or storage())
        + offset
        + shape
        + strides
        + rest
        + b"tR"
    )


def plain(pickled: bytes) -> Any:
    """What is in a pickle, with None for every tensor."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, attribute: str) -> Any:
            return {"OrderedDict": dict, "Namespace": dict}.get(attribute, lambda *_: None)

        def persistent_load(self, pid: Any) -> None:
            return None

    return Unpickler(BytesIO(pickled)).load()


LEGACY_START = (
    b"\x80\x02" + number(0x1950A86A20F9469CFC6C) + b".\x80\x02M\xe9\x03.\x80\x02}" + text("little_endian") + b"\x88s."
)


def legacy_of(archive: bytes) -> bytes:
    """The form before PyTorch 1.6 of a file in the other one."""
    files = {name.partition("/")[2]: data for name, data in members(archive).items()}
    storages = {name.removeprefix("data/"): data for name, data in files.items() if name.startswith("data/")}
    keys = b"\x80\x02](" + b"".join(map(text, storages)) + b"e."
    numbers = b"".join(struct.pack("<Q", len(data) // 4) + data for data in storages.values())
    return LEGACY_START + files["data.pkl"] + keys + numbers


# ------------------------------------------------------------------ MessagePack


def pack(value: Any) -> bytes:
    """Text, bytes, numbers, lists and maps; bytes are taken as packed already."""
    match value:
        case bytes():
            return value
        case str():
            data = value.encode()
            return b"\xdb" + struct.pack(">I", len(data)) + data
        case int():
            return struct.pack(">Bq", 0xD3, value) if value < 0 else struct.pack(">BQ", 0xCF, value)
        case list():
            return b"\xdd" + struct.pack(">I", len(value)) + b"".join(map(pack, value))
        case dict():
            return b"\xdf" + struct.pack(">I", len(value)) + b"".join(pack(k) + pack(v) for k, v in value.items())
    raise TypeError(value)


def raw(data: bytes) -> bytes:
    return b"\xc6" + struct.pack(">I", len(data)) + data


def extension(data: bytes, kind: int = 1, size: int | None = None) -> bytes:
    return b"\xc9" + struct.pack(">IB", len(data) if size is None else size, kind) + data


# ------------------------------------------------------------------ HDF5


def h5(change: Callable[[Any, Path], None], content: bytes = b"", **options: Any) -> bytes:
    """A file that h5py has changed, or made; the folder is for further files."""
    import h5py

    with TemporaryDirectory() as folder:
        path = Path(folder) / "x.h5"
        if content:
            path.write_bytes(content)
        with h5py.File(path, "r+" if content else "w", **options) as file:
            change(file, Path(folder))
        return path.read_bytes()


def h5_anew(content: bytes) -> bytes:
    """The same in the form of HDF5 1.8 and later."""
    import h5py

    def copy(source: Any, target: Any, made: dict[int, Any]) -> None:
        target.attrs.update(source.attrs)
        for key, node in source.items():
            address = h5py.h5o.get_info(node.id).addr
            if address in made:
                target[key] = made[address]
            elif isinstance(node, h5py.Dataset):
                made[address] = target.create_dataset(key, data=node[()])
                made[address].attrs.update(node.attrs)
            else:
                made[address] = target.create_group(key)
                copy(node, made[address], made)

    def change(file: Any, folder: Path) -> None:
        (folder / "old.h5").write_bytes(content)
        with h5py.File(folder / "old.h5") as old:
            copy(old, file, {})

    return h5(change, libver="latest")


# ------------------------------------------------------------------ NumPy


def npy(header: str | bytes, data: bytes = b"", version: tuple[int, int] = (1, 0), size: int | None = None) -> bytes:
    encoded = header.encode() if isinstance(header, str) else header
    length = struct.pack("<H" if version[0] == 1 else "<I", len(encoded) if size is None else size)
    return b"\x93NUMPY" + bytes(version) + length + encoded + data


def array_header(shape: Any, descr: Any = "<f4", fortran: Any = False) -> str:
    return repr({"descr": descr, "fortran_order": fortran, "shape": shape}) + "\n"


def floats(count: int) -> bytes:
    return np.arange(count, dtype="<f4").tobytes()


# ------------------------------------------------------------------ Orbax


def orbax_packed(files: Mapping[str, bytes], database: bool) -> dict[str, bytes]:
    """A folder whose arrays tensorstore has packed, each in a folder of its own or all in one database."""
    import tensorstore

    headers = {path.split("/")[1]: json.loads(content) for path, content in files.items() if path.endswith(".zarray")}
    with TemporaryDirectory() as folder:
        root = Path(folder) / "orbax"
        for key, header in headers.items():
            content = files[f"orbax/{key}/" + ".".join("0" for _ in header["shape"])]
            array = np.frombuffer(content, header["dtype"]).reshape(header["shape"])
            store = {"driver": "file", "path": f"{root}/{key}/"}
            if database:
                store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{root}/"}, "path": f"{key}/"}
            spec = {"driver": "zarr", "kvstore": store}
            tensorstore.open(spec, create=True, dtype=array.dtype, shape=array.shape).result().write(array).result()
        (root / "_METADATA").write_bytes(files["orbax/_METADATA"])
        (Path(folder) / "config.json").write_bytes(files["config.json"])
        return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
