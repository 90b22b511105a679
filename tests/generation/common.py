"""The decoders and prompts that generation is tested on, as data, and what a call of the whole model says of a text."""

import tempfile
from functools import cache
from pathlib import Path

import numpy as np

from roberta_pln import checkpoint, schema
from roberta_pln.config import RobertaPreLayerNormConfig
from tests.contract import PAD, load, precision, tiny_config

BOS, EOS = 0, 2
VOCAB = 40
PRUNED = {0: [1, 3], 1: [0]}

DECODERS = {
    "plain": {},
    "relative_key": {"position_embedding_type": "relative_key"},
    "relative_key_query": {"position_embedding_type": "relative_key_query"},
    "with an encoder": {"add_cross_attention": True},
    "pruned heads": {"pruned_heads": PRUNED},
    "pruned heads, with an encoder": {"pruned_heads": PRUNED, "add_cross_attention": True},
    "another pad token": {"pad_token_id": 5},
    "untied": {"tie_word_embeddings": False},
    "no layers": {"num_hidden_layers": 0},
    "one layer": {"num_hidden_layers": 1},
}
"""Changes of the config."""

_rng = np.random.default_rng(11)
STATES = {
    "encoder_hidden_states": _rng.standard_normal((3, 5, 32)),
    "encoder_attention_mask": np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]]),
}


def decoder_config(**changes) -> RobertaPreLayerNormConfig:
    return tiny_config(**{"vocab_size": VOCAB, "max_position_embeddings": 80, "is_decoder": True, **changes})


def talkative(config: RobertaPreLayerNormConfig, seed: int = 0, ending: float = 1.0) -> dict[str, np.ndarray]:
    """Weights with which one token is much likelier than another, which one depends on all before it, and texts end.

    Args:
        config: the model's.
        seed: of the weights.
        ending: what the eos token's logit is raised by.
    """
    rng, tensors = np.random.default_rng(seed), {}
    for name, parameter in schema.expand(config, "ForCausalLM").items():
        drawn = parameter.initializer == "normal"
        noise = (0.4 if drawn else 0.1) * rng.standard_normal(parameter.shape)
        tensors[name] = (noise if drawn else parameter.initializer + noise).astype(np.float32)
    tensors["lm_head.bias"][EOS] += ending
    return tensors


_FOLDER = tempfile.TemporaryDirectory()  # for as long as the tests run


@cache
def saved(seed: int = 0, ending: float = 1.0, **changes) -> Path:
    """A checkpoint that any backend loads."""
    config, folder = decoder_config(**changes), Path(_FOLDER.name, f"{seed} {ending} {changes}")
    checkpoint.save(talkative(config, seed, ending), folder, config, "ForCausalLM")
    return folder


@cache
def decoder(backend: str, name: str = "plain", dtype: str = "float64", seed: int = 0, ending: float = 1.0):
    """One of the decoders in one backend, kept with what it has compiled."""
    with precision(backend, dtype):
        folder = Path(_FOLDER.name, f"{name} {seed} {ending}")
        if not folder.exists():
            config = decoder_config(**DECODERS[name])
            checkpoint.save(talkative(config, seed, ending), folder, config, "ForCausalLM")
        return load(backend, folder, "ForCausalLM", dtype)


# ------------------------------------------------------------- prompts


def prompts(*lengths: int, columns: int, pad: int = PAD, sides: str = "", seed: int = 0) -> dict[str, np.ndarray]:
    """Random prompts with their mask.

    Args:
        lengths: tokens of each row.
        columns: of the arrays; the rest of a row is padding.
        pad: the pad token.
        sides: for each row `l` for padding on the left, `r` for the right, `b` for both; the left by default.
        seed: of the tokens.
    """
    rng = np.random.default_rng(seed)
    ids, mask = np.full((len(lengths), columns), pad), np.zeros((len(lengths), columns), np.int64)
    for row, (length, side) in enumerate(zip(lengths, sides or "l" * len(lengths), strict=True)):
        start = {"l": columns - length, "r": 0, "b": (columns - length) // 2}[side]
        ids[row, start : start + length] = rng.integers(6, VOCAB, length)  # no special token, nor the other pad token
        mask[row, start : start + length] = 1
    return {"input_ids": ids, "attention_mask": mask}


PROMPTS = {
    "no padding": prompts(6, 6, 6, columns=6),
    "left padding": prompts(6, 4, 1, columns=6),
    "right padding": prompts(3, 6, 1, columns=6, sides="rrr"),
    "padding on every side": prompts(2, 4, 6, columns=8, sides="lrb"),
    "more padding than needed": prompts(3, 2, 4, columns=10, sides="lrb"),
}


def without_padding(inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The tokens of each prompt."""
    return [ids[mask > 0] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]


# ------------------------------------------------------------- calls

EAGER = {"pt": {}, "tf": {"compiled": False}, "flax": {"compiled": False}}
"""How a loop is not compiled, which takes less time for a single call of a small model."""
COMPILED = {
    "pt": {"as it is": {}},
    "tf": {"compiled": {"compiled": True}, "compiled by XLA": {"jit_compile": True}},
    "flax": {"compiled": {"compiled": True}},
}
"""How each backend may run it."""


def array(value) -> np.ndarray:
    """A tensor of any framework as an array; bfloat16, which NumPy has not, as float32."""
    if hasattr(value, "detach"):
        value = value.detach().float() if str(value.dtype) == "torch.bfloat16" else value.detach()
    value = np.asarray(value)
    return value.astype(np.float32) if value.dtype.name == "bfloat16" else value


def generate(model, inputs: dict, **options) -> dict[str, np.ndarray]:
    """The fields of the record by name; scores and logits of all steps are one array, (N, R, V).

    The loop is not compiled, unless the options say how it is.
    """
    how = {} if {"compiled", "jit_compile"} & set(options) else EAGER[model.framework]
    record = model.generate(**inputs, return_dict_in_generate=True, **options, **how)
    return {
        name: np.stack([array(item) for item in value]) if isinstance(value, tuple) else array(value)
        for name, value in record.items()
    }


def forward(model, inputs: dict) -> np.ndarray:
    """The logits of a call, (B, T, V)."""
    return array(model(**inputs, use_cache=False).logits)


def logits_of(model, texts: list[np.ndarray], width: int, **rest) -> np.ndarray:
    """Logits behind every token of some texts by one call on all of them, (R, width, V); nothing of them is padding.

    Args:
        model: any backend's.
        texts: each its tokens.
        width: columns of the call, so that calls have one shape.
        rest: further arguments.
    """
    ids = np.full((len(texts), width), model.config.pad_token_id)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = text
    mask = np.arange(width)[None] < np.array([len(text) for text in texts])[:, None]
    return forward(model, {"input_ids": ids, "attention_mask": mask.astype(np.int64), **rest})
