"""Every format to every other and back, bit for bit."""

from itertools import combinations_with_replacement, product

import ml_dtypes
import numpy as np
import pytest

from roberta_pln import checkpoint, schema
from roberta_pln.checkpoint import FORMATS, CheckpointError, shards
from roberta_pln.checkpoint.formats import FORMATS as ROWS
from tests.contract import random_tensors, tiny_config

CONFIG = tiny_config(
    vocab_size=11,
    hidden_size=4,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=6,
    max_position_embeddings=9,
)
UNTIED = CONFIG.replace(tie_word_embeddings=False)
CASES = {
    **{head: (CONFIG, head) for head in schema.HEADS},
    **{f"{head}, untied": (UNTIED, head) for head in schema.LM_HEADS},
}
DTYPES = {"float32": np.float32, "float64": np.float64, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
ONE, MANY = shards.DEFAULT_SIZE, 100
TYPES = f"{schema.PREFIX}.embeddings.token_type_embeddings.weight"

HELD_BY_FAIRSEQ = {"ForMaskedLM", "ForMaskedLM, untied", "ForSequenceClassification"}


def refusal(format, case, dtype):
    """What the error says where a format cannot hold a model; None where it can."""
    if format == "h5" and dtype == "bfloat16":
        return "HDF5 has no bfloat16"
    if format == "fairseq" and case not in HELD_BY_FAIRSEQ:
        return "fairseq cannot hold this model"
    return None


PLANS = [
    *product(combinations_with_replacement(FORMATS, 2), CASES, ["float32"], [ONE]),
    *product(product(["safetensors"], FORMATS), CASES, ["float64", "float16", "bfloat16"], [ONE]),
    *product(product(["safetensors"], [name for name, row in ROWS.items() if row.shards]), CASES, DTYPES, [MANY]),
]
"""All pairs with every head; and through safetensors, which holds everything, all types and numbers of files."""


@pytest.fixture(autouse=True)
def memory_only(monkeypatch):
    """Flushing files to disk takes most of the time, and changes none of them."""
    monkeypatch.setattr("os.fsync", lambda _: None)


def tensors_of(case, dtype, formats):
    """Random tensors that begin with what numbers do not show: NaN with a message, -0, infinity, the smallest."""
    config, head = CASES[case]
    tensors = {name: array.astype(DTYPES[dtype]) for name, array in random_tensors(config, head).items()}
    for array in tensors.values():
        some = array.reshape(-1)[:4]
        some[:] = [np.nan, -0.0, -np.inf, np.finfo(np.float16).smallest_subnormal][: len(some)]
        some[:1].view(np.uint8)[0] ^= 5
    if "fairseq" in formats:
        tensors[TYPES][:] = 0
    return tensors


def assert_same(folder, tensors, case, format):
    config, head = CASES[case]
    opened = checkpoint.open(folder)
    assert (opened.format, opened.head, set(opened)) == (format, head, set(tensors))
    dtype = next(iter(tensors.values())).dtype.name
    assert opened.config == config.replace(dtype=dtype, architectures=[schema.architecture(head)])
    for name, array in tensors.items():
        for found in (opened[name], opened.mapped(name)):
            assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes()), name


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def there_and_back(folder, formats, case, dtype, size):
    """Save in the first format, convert to the second, and back."""
    tensors = tensors_of(case, dtype, formats)
    first, second = formats
    checkpoint.save(tensors, folder / "saved", *CASES[case], first, max_shard_size=size)
    checkpoint.convert(folder / "saved", folder / "there", second, max_shard_size=size)
    checkpoint.convert(folder / "there", folder / "back", first, max_shard_size=size)
    for name, format in (("saved", first), ("there", second), ("back", first)):
        assert_same(folder / name, tensors, case, format)
    assert content(folder / "back").items() >= content(folder / "saved").items()  # beside them fairseq has label names
    assert (size == MANY) == any("-of-" in path.name for path in content(folder / "there"))


@pytest.mark.parametrize(("formats", "case", "dtype", "size"), PLANS, ids=str)
def test_every_format_to_every_other_and_back(tmp_path, formats, case, dtype, size):
    texts = [text for format in formats if (text := refusal(format, case, dtype))]
    if not texts:
        there_and_back(tmp_path, formats, case, dtype, size)
    else:
        with pytest.raises(CheckpointError, match=texts[0]):
            there_and_back(tmp_path, formats, case, dtype, size)
        assert not any(content(folder) for folder in tmp_path.iterdir() if folder.name != "saved")


@pytest.mark.parametrize("format", FORMATS)
def test_one_bit_is_seen(tmp_path, format):
    """The control: without it, the comparison above might be of nothing."""
    tensors = tensors_of("ForMaskedLM", "float32", [format])
    checkpoint.save(tensors, tmp_path, *CASES["ForMaskedLM"], format)
    assert_same(tmp_path, tensors, "ForMaskedLM", format)
    numbers = tensors["lm_head.bias"].tobytes()
    (path,) = [path for path, held in content(tmp_path).items() if numbers in held]
    changed = bytes([numbers[0] ^ 1]) + numbers[1:]
    (tmp_path / path).write_bytes((tmp_path / path).read_bytes().replace(numbers, changed))
    with pytest.raises(AssertionError, match=r"lm_head\.bias"):
        assert_same(tmp_path, tensors, "ForMaskedLM", format)
