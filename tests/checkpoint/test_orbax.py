"""Folders of Orbax: what Orbax restores and saves, and what is refused."""

import json
import shutil
import sys
from functools import partial
from itertools import product

import ml_dtypes
import numpy as np
import pytest

from roberta_pln import checkpoint, names
from roberta_pln.checkpoint import CheckpointError, orbax
from tests.contract import is_mapped, random_tensors, tiny_config

CONFIG = tiny_config(hidden_size=8, intermediate_size=12, num_hidden_layers=1)
DTYPES = {"float32": "float32", "float64": "float64", "float16": "float16", "bfloat16": ml_dtypes.bfloat16}
BIAS = "lm_head.bias"


@pytest.fixture(autouse=True)
def memory_only(monkeypatch):
    """Flushing dozens of files to disk takes most of the time, and changes none of them."""
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.fixture(scope="module")
def library():
    pytest.importorskip("jax")
    return pytest.importorskip("orbax.checkpoint")


def values(head="ForMaskedLM", dtype="float32", config=CONFIG):
    return {name: array.astype(DTYPES[dtype]) for name, array in random_tensors(config, head).items()}


def tree_of(tensors, head="ForMaskedLM"):
    """The nested dict of Flax's parameters."""
    tree = {}
    for name, array in tensors.items():
        target = names.stored("flax", name, head)
        *path, leaf = target.name.split("/")
        inner = tree
        for key in path:
            inner = inner.setdefault(key, {})
        inner[leaf] = np.ascontiguousarray(array.T) if target.transposed else array
    return tree


def assert_equal(ours, theirs):
    assert set(ours) == set(theirs)
    for name, array in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (array.dtype, array.shape)
        assert ours[name].tobytes() == array.tobytes()


def assert_same_tree(ours, theirs):
    import jax

    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for found, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert found.dtype == expected.dtype
        assert np.asarray(found).tobytes() == expected.tobytes()


# ------------------------------------------------------------------ with Orbax


@pytest.mark.parametrize(
    ("head", "dtype"), [*product(["ForMaskedLM"], DTYPES), ("Model", "float32"), ("ForTokenClassification", "float32")]
)
def test_orbax_restores_what_is_written(library, tmp_path, head, dtype):
    tensors = values(head, dtype)
    path = checkpoint.save(tensors, tmp_path, CONFIG, head, "orbax")
    for checkpointer in (library.StandardCheckpointer(), library.PyTreeCheckpointer()):
        assert_same_tree(checkpointer.restore(path), tree_of(tensors, head))


def test_orbax_restores_arrays_of_jax_where_it_is_given_such(library, tmp_path):
    import jax

    tree = tree_of(values())
    path = checkpoint.save(values(), tmp_path, CONFIG, "ForMaskedLM", "orbax")
    restored = library.StandardCheckpointer().restore(path, jax.tree.map(jax.numpy.zeros_like, tree))
    assert_same_tree(restored, tree)
    assert all(isinstance(array, jax.Array) for array in jax.tree.leaves(restored))


def standard(library, path, tree):
    checkpointer = library.StandardCheckpointer()
    checkpointer.save(path, tree)
    checkpointer.wait_until_finished()


def of_jax(library, path, tree):
    import jax

    standard(library, path, jax.tree.map(jax.numpy.asarray, tree))


def pytree(library, path, tree, **options):
    library.Checkpointer(library.PyTreeCheckpointHandler(**options)).save(path, tree)


def manager(library, path, tree):
    with library.CheckpointManager(path) as manager:
        manager.save(7, args=library.args.StandardSave(tree))
    (path / "7" / "default").rename(path.with_name("step"))
    shutil.rmtree(path)
    path.with_name("step").rename(path)


WAYS = {
    "standard": standard,
    "of JAX": of_jax,
    "pytree": pytree,
    "a folder for each": partial(pytree, use_ocdbt=False),
    "zarr 3": partial(pytree, use_zarr3=True),
    "zarr 3, a folder for each": partial(pytree, use_ocdbt=False, use_zarr3=True),
    "manager": manager,
}


@pytest.mark.parametrize(
    ("way", "dtype"),
    [*product(WAYS, ["float32"]), *product(["standard", "a folder for each"], ["float16", "bfloat16"])],
)
def test_reads_what_orbax_saves(library, tmp_path, way, dtype):
    tensors = values(dtype=dtype)
    WAYS[way](library, tmp_path / "any", tree_of(tensors))
    opened = checkpoint.open(tmp_path / "any", CONFIG)
    assert_equal(opened, tensors)
    assert (opened.format, opened.head, opened.foreign) == ("orbax", "ForMaskedLM", ())
    assert all(opened[name].flags.c_contiguous and opened[name].flags.aligned for name in opened)


def test_reads_the_state_of_training(library, tmp_path):
    optax = pytest.importorskip("optax")
    from flax.training.train_state import TrainState

    tensors = values()
    state = TrainState.create(apply_fn=None, params=tree_of(tensors), tx=optax.adam(1e-3))
    pytree(library, tmp_path / "state", state)
    opened = checkpoint.open(tmp_path / "state", CONFIG)
    assert_equal(opened, tensors)
    assert (set(opened.dropped), opened.foreign) == ({"step", "opt_state"}, ())


ERRORS = {"standard": 2 * 2, "a folder for each": 2 * (1 + 2 * len(values()))}
"""Two changes each: of the list and the manifest at least, and of header and numbers of every array."""


@pytest.mark.parametrize("way", ERRORS)
def test_what_orbax_saved_is_cut_short(library, tmp_path, way):
    """Whichever file is lost or shortened: an error, and no zeros in its place."""
    tensors = values()
    WAYS[way](library, tmp_path / "whole", tree_of(tensors))
    errors = 0
    for file in [file for file in (tmp_path / "whole").rglob("*") if file.is_file()]:
        content = file.read_bytes()
        for change in (file.unlink, partial(file.write_bytes, content[: len(content) // 2])):
            change()
            try:
                found = dict(checkpoint.open(tmp_path / "whole", CONFIG))
            except (CheckpointError, FileNotFoundError):
                errors += 1
            else:
                assert_equal(found, tensors)  # the file is not needed
            file.write_bytes(content)
    assert errors >= ERRORS[way]


# ------------------------------------------------------------------ without Orbax


@pytest.fixture
def path(tmp_path):
    return checkpoint.save(values(), tmp_path, CONFIG, "ForMaskedLM", "orbax")


def test_what_is_written_takes_no_library_to_read(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    assert_equal(checkpoint.open(path), values())
    assert checkpoint.open(path.parent).path == path
    assert is_mapped(orbax.read(path).tensors["lm_head/bias"].map())


def test_compression_takes_tensorstore(library, tmp_path, monkeypatch):
    standard(library, tmp_path / "any", tree_of(values()))
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    with pytest.raises(ImportError, match=r"needs tensorstore: pip install 'roberta_pln\[orbax\]'"):
        checkpoint.open(tmp_path / "any", CONFIG)


def change_json(file, change):
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def shape_of(*shape):
    return lambda values: values.update(shape=shape, chunks=shape)


def keys_of(path):
    def change(values):
        values["tree_metadata"]["('lm_head', 'bias')"]["key_metadata"] = [{"key": part} for part in path]

    return change


DAMAGES = {
    "no numbers": (lambda path: (path / BIAS / "0").unlink(), "cut short or not there"),
    "too few numbers": (lambda path: (path / BIAS / "0").write_bytes(bytes(98 * 4)), "needs 396 bytes"),
    "too many numbers": (lambda path: (path / BIAS / "0").write_bytes(bytes(100 * 4)), "needs 396 bytes"),
    "a negative shape": (lambda path: change_json(path / BIAS / ".zarray", shape_of(-11, -9)), "no array has"),
    "a shape of texts": (lambda path: change_json(path / BIAS / ".zarray", shape_of("99")), "no array has"),
    "another shape": (
        lambda path: change_json(path / BIAS / ".zarray", shape_of(2**40, 2**40)),
        "not there|larger than",
    ),
    "half a header": (lambda path: (path / BIAS / ".zarray").write_text('{"shape'), "cut short"),
    "no list": (lambda path: (path / "_METADATA").write_text("{}"), "does not list arrays"),
    "half a list": (lambda path: (path / "_METADATA").write_text('{"tree_'), "does not list arrays"),
    "another list": (lambda path: (path / "_METADATA").write_text('{"tree_metadata": {"a": 3}}'), "does not list"),
    "a path": (lambda path: change_json(path / "_METADATA", keys_of(["..", "x"])), "does not list|not there|cut short"),
    "an absolute path": (lambda path: change_json(path / "_METADATA", keys_of(["/etc"])), "is no path of names"),
    "an empty path": (lambda path: change_json(path / "_METADATA", keys_of(["", "", ""])), "is no path of names"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_refused(path, case):
    damage, text = DAMAGES[case]
    damage(path)
    with pytest.raises(CheckpointError, match=text):
        checkpoint.open(path)


def test_equal_tensors_give_equal_folders(path, tmp_path):
    again = checkpoint.save(checkpoint.open(path), tmp_path / "again", CONFIG, "ForMaskedLM", "orbax")
    for file in path.rglob("*"):
        assert file.is_dir() or (again / file.relative_to(path)).read_bytes() == file.read_bytes()


def test_folders_of_others_stay(tmp_path):
    """A user may keep steps of training in a folder of that name."""
    (tmp_path / "orbax" / "7").mkdir(parents=True)
    (tmp_path / "orbax" / "7" / "notes").write_text("mine")
    checkpoint.save(values(), tmp_path, CONFIG, "ForMaskedLM")
    with pytest.raises(CheckpointError, match="orbax is there already and is no checkpoint"):
        checkpoint.save(values(), tmp_path, CONFIG, "ForMaskedLM", "orbax")
    assert (tmp_path / "orbax" / "7" / "notes").read_text() == "mine"
