"""The configs and inputs that every backend is tested on, as data."""

import mmap
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np

from roberta_pln import checkpoint, schema
from roberta_pln.backends import BACKENDS
from roberta_pln.config import RobertaPreLayerNormConfig

DATA = Path(__file__).parent / "data"

FORMATS = tuple(format for format in checkpoint.FORMATS if format != "fairseq")
"""The formats that hold every model."""

TINY = dict(
    vocab_size=99,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=37,
    max_position_embeddings=40,
    layer_norm_eps=1e-5,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
BASE = dict(
    vocab_size=50265,
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
    max_position_embeddings=514,
    type_vocab_size=1,
    layer_norm_eps=1e-5,
)

PAD = 1


def tiny_config(**changes) -> RobertaPreLayerNormConfig:
    return RobertaPreLayerNormConfig(**{**TINY, **changes})


def random_tensors(config: RobertaPreLayerNormConfig, head: str, seed: int = 0, pooler: bool = True):
    """Weights far from their initial values, so that no bias is zero and no norm is the identity."""
    rng = np.random.default_rng(seed)
    return {
        name: (
            (0.0 if parameter.initializer == "normal" else parameter.initializer)
            + 0.1 * rng.standard_normal(parameter.shape)
        ).astype(np.float32)
        for name, parameter in schema.expand(config, head, pooler).items()
    }


def random_checkpoint(folder: Path, config: RobertaPreLayerNormConfig, head: str, seed: int = 0) -> Path:
    """A directory that any backend loads."""
    checkpoint.save(random_tensors(config, head, seed), folder, config, head)
    return folder


def random_ids(batch: int = 3, length: int = 11, vocab_size: int = 99, seed: int = 0) -> np.ndarray:
    """Ids without padding."""
    return np.random.default_rng(seed).integers(PAD + 1, vocab_size, (batch, length))


def padded(ids: np.ndarray, *pads: tuple[int, slice]) -> dict[str, np.ndarray]:
    """Ids and mask with some slices of some rows padded."""
    ids = ids.copy()
    for row, part in pads:
        ids[row, part] = PAD
    return {"input_ids": ids, "attention_mask": (ids != PAD).astype(np.int64)}


def _rng(seed: int = 7) -> np.random.Generator:
    return np.random.default_rng(seed)


INPUTS = {
    "one token": {"input_ids": random_ids(1, 1)},
    "no mask": {"input_ids": random_ids()},
    "right padding": padded(random_ids(), (0, slice(7, None)), (1, slice(10, None))),
    "left padding": padded(random_ids(), (0, slice(0, 5)), (2, slice(0, 1))),
    "padding inside": padded(random_ids(), (0, slice(3, 6)), (1, slice(0, 2)), (1, slice(9, None))),
    "a fully padded row": padded(random_ids(), (1, slice(None)), (2, slice(4, None))),
    "a fully masked row": {
        "input_ids": random_ids(),
        "attention_mask": np.array([[1] * 11, [0] * 11, [0] * 4 + [1] * 7]),
    },
    "pads that are seen": {"input_ids": padded(random_ids(), (0, slice(7, None)))["input_ids"]},
    "explicit positions": {"input_ids": random_ids(), "position_ids": _rng().integers(0, 40, (3, 11))},
    "one row of positions": {"input_ids": random_ids(), "position_ids": np.arange(11)[None] + 20},
    "token types": {"input_ids": random_ids(), "token_type_ids": _rng().integers(0, 2, (3, 11))},
    "embeddings": {"inputs_embeds": _rng().standard_normal((3, 11, 32))},
    "maximum length": {"input_ids": random_ids(2, 38)},
    "a mask of three axes": {"input_ids": random_ids(), "attention_mask": _rng().integers(0, 2, (3, 11, 11))},
    "a mask of four axes": {"input_ids": random_ids(), "attention_mask": _rng().integers(0, 2, (3, 4, 11, 11))},
    "a mask of booleans": {"input_ids": random_ids(), "attention_mask": _rng().integers(0, 2, (3, 11)) > 0},
    "a mask of other numbers": {
        "input_ids": random_ids(),
        "attention_mask": _rng().choice([0.0, 0.5, 1.0, 2.0], (3, 11)),
    },
    "a head mask": {"input_ids": random_ids(), "head_mask": np.array([1.0, 0.0, 0.5, 2.0])},
    "a head mask by layer": {"input_ids": random_ids(), "head_mask": _rng().random((2, 4))},
}
"""Arguments of a call on `TINY`, in NumPy."""

CONFIGS = {
    "plain": {},
    "relative_key": {"position_embedding_type": "relative_key"},
    "relative_key_query": {"position_embedding_type": "relative_key_query"},
    "untied": {"tie_word_embeddings": False},
    "another pad token": {"pad_token_id": 5},
    "decoder": {"is_decoder": True},
    "pruned heads": {"pruned_heads": {0: [1, 3], 1: [0]}},
    "chunked feed-forward": {"chunk_size_feed_forward": 11},
    "no layers": {"num_hidden_layers": 0},
    "large epsilon": {"layer_norm_eps": 1e-1},
}
"""Changes of `TINY`."""


_ROWS = padded(random_ids(), (0, slice(7, None)))
_CHOICES = {"input_ids": random_ids(6).reshape(2, 3, 11), "attention_mask": _rng().integers(0, 2, (2, 3, 11))}

HEADS = {
    "causal": ("ForCausalLM", {"is_decoder": True}, {**_ROWS, "labels": random_ids(seed=1)}),
    "causal without a mask": ("ForCausalLM", {"is_decoder": True}, {"input_ids": random_ids()}),
    "causal that sees both sides": ("ForCausalLM", {}, {**_ROWS, "labels": random_ids(seed=1)}),
    "causal, with an encoder": (
        "ForCausalLM",
        {"is_decoder": True, "add_cross_attention": True},
        {
            **_ROWS,
            "labels": np.where(_rng().random((3, 11)) < 0.5, random_ids(seed=1), -100),
            "encoder_hidden_states": _rng().standard_normal((3, 5, 32)),
            "encoder_attention_mask": np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]]),
        },
    ),
    "causal, with an encoder and a pattern": (
        "ForCausalLM",
        {"is_decoder": True, "add_cross_attention": True},
        {
            **_ROWS,
            "encoder_hidden_states": _rng().standard_normal((3, 5, 32)),
            "encoder_attention_mask": _rng().integers(0, 2, (3, 11, 5)),
        },
    ),
    "classes": ("ForSequenceClassification", {"num_labels": 3}, {**_ROWS, "labels": np.array([0, 2, -100])}),
    "classes in a column": (
        "ForSequenceClassification",
        {"num_labels": 3},
        {**_ROWS, "labels": np.array([[0], [2], [1]])},
    ),
    "a regression": ("ForSequenceClassification", {"num_labels": 1}, {**_ROWS, "labels": np.array([0.1, 2.0, -0.3])}),
    "a regression on integers": (
        "ForSequenceClassification",
        {"num_labels": 1},
        {**_ROWS, "labels": np.array([[1], [2], [0]])},
    ),
    "several targets": ("ForSequenceClassification", {"num_labels": 4}, {**_ROWS, "labels": _rng().random((3, 4))}),
    "several values": (
        "ForSequenceClassification",
        {"num_labels": 4, "problem_type": "regression"},
        {**_ROWS, "labels": _rng().random((3, 4))},
    ),
    "tokens": (
        "ForTokenClassification",
        {"num_labels": 5},
        {**_ROWS, "labels": np.where(_ROWS["attention_mask"] > 0, random_ids(seed=2) % 5, -100)},
    ),
    "an answer": (
        "ForQuestionAnswering",
        {},
        {**_ROWS, "start_positions": np.array([1, 4, 3]), "end_positions": np.array([[4], [5], [10]])},
    ),
    "an answer that is outside": (
        "ForQuestionAnswering",
        {},
        {**_ROWS, "start_positions": np.array([1, 100, 3]), "end_positions": np.array([4, 11, 10])},
    ),
    "choices": ("ForMultipleChoice", {}, {**_CHOICES, "labels": np.array([2, 0])}),
    "choices, one left out": ("ForMultipleChoice", {}, {**_CHOICES, "labels": np.array([2, -100])}),
    "choices of embeddings": (
        "ForMultipleChoice",
        {},
        {"inputs_embeds": _rng().standard_normal((2, 3, 11, 32)), "labels": np.array([2, 0])},
    ),
}
"""What each head beside the masked language model is tested on: head, changes of `TINY`, arguments."""


def with_labels(inputs: dict[str, np.ndarray], seed: int = 3) -> dict[str, np.ndarray]:
    """The inputs with labels at about half of the positions, at least one of them."""
    some = inputs.get("input_ids", inputs.get("inputs_embeds"))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 99, some.shape[:2])
    chosen = rng.random(labels.shape) < 0.5
    chosen[0, 0] = True
    return {**inputs, "labels": np.where(chosen, labels, -100)}


@contextmanager
def precision(backend: str, dtype: str) -> Iterator[None]:
    """Where a backend has to be told that float64 is wanted, tell it."""
    if backend == "flax":
        import jax

        with jax.enable_x64(True) if dtype == "float64" else nullcontext():
            yield
    else:
        yield


def load(backend: str, path: Path, head: str, dtype: str = "float64", **options):
    """A model of one backend."""
    return BACKENDS[backend].model_class(head).from_pretrained(path, dtype=dtype, **options)


def is_mapped(array: np.ndarray) -> bool:
    """Whether an array's memory is that of a file: nothing was copied."""
    owner = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    return isinstance(owner, memoryview) and isinstance(owner.obj, mmap.mmap)
