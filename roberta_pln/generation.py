"""What a generation does, decided before its first step and without any framework.

`GenerationConfig` is `generation_config.json`. `plan` turns it, and the options of one call, into a `Plan`: everything
that the compiled code of a backend depends on, checked. `arrange` turns the prompts into a `Prompt`: rows of one
length whose last token is the last column, with the positions that the model's forward would give them.

Where the rules come from: the names, the order of the processors and the arithmetic of the beams are those of
transformers 4.57, so that the same model gives the same tokens; the positions are those of the model's own forward.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from roberta_pln.checks import InputError
from roberta_pln.config import ConfigError, RobertaPreLayerNormConfig, read_json

GENERATION_CONFIG_FILE: Final = "generation_config.json"

Ids = int | Sequence[int] | None


@dataclass
class GenerationConfig:
    """How to continue prompts; the content of `generation_config.json`.

    The names and defaults are those of transformers. Keys that are not named here are kept in `extra` and written
    back; one that asks for something there is not here is refused when a text is generated.

    Raises:
        ConfigError: from `validate`, when a value breaks a rule.
    """

    max_length: int = 20
    """Tokens of the prompt (its padding counts) and the continuation together; `max_new_tokens` wins over it."""
    max_new_tokens: int | None = None
    """Most tokens of the continuation."""
    min_length: int = 0
    """No end before so many tokens, those of the prompt counted."""
    min_new_tokens: int | None = None
    """No end before so many tokens of the continuation."""
    do_sample: bool = False
    """Draw tokens instead of taking the most likely."""
    num_beams: int = 1
    """Beams of a beam search; 1 is none."""
    early_stopping: bool | str = False
    """When a beam search ends: `True` as soon as there are `num_beams` ended ones; `False` when the best running one,
    scored at its length, is no better than they are; `"never"` scores it at the greatest length instead."""
    length_penalty: float = 1.0
    """A beam's score is its log-probability divided by its length to this power."""
    num_return_sequences: int = 1
    """Continuations of each prompt: independent draws, or the best beams."""
    use_cache: bool = True
    """Keep keys and values of earlier tokens; the tokens are the same without, and take longer."""
    temperature: float | None = 1.0
    """Scores are divided by it before drawing."""
    top_k: int | None = 50
    """Draw from so many of the most likely tokens; 0 or None from all."""
    top_p: float | None = 1.0
    """Draw from the fewest tokens whose probabilities add up to this."""
    min_p: float | None = None
    """Draw from tokens at least this fraction as likely as the most likely one."""
    typical_p: float | None = 1.0
    """Draw from the tokens of the most typical information whose probabilities add up to this (Meister et al. 2022)."""
    repetition_penalty: float | None = 1.0
    """Scores of tokens that are there are divided by it, or multiplied where they are negative (Keskar et al. 2019)."""
    no_repeat_ngram_size: int | None = 0
    """No sequence of so many tokens comes twice; 0 or None lets it."""
    bad_words_ids: Sequence[Sequence[int]] | None = None
    """Sequences of tokens that do not come."""
    forced_bos_token_id: int | None = None
    """The first token behind a prompt of one token."""
    forced_eos_token_id: Ids = None
    """The token, or one of those, that comes last where the greatest length is reached."""
    suppress_tokens: Sequence[int] | None = None
    """Tokens that never come."""
    begin_suppress_tokens: Sequence[int] | None = None
    """Tokens that do not come first."""
    pad_token_id: int | None = None
    """Fills rows that have ended; the model's if not given."""
    bos_token_id: int | None = None
    """Starts a text without a prompt; the model's if not given."""
    eos_token_id: Ids = None
    """The token, or those, that end a text; the model's if not given."""
    output_scores: bool = False
    """Return the scores of every step, as the processors left them."""
    output_logits: bool = False
    """Return the logits of every step, as the model gave them."""
    return_dict_in_generate: bool = False
    """Return a `GenerateOutput` instead of the sequences alone."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Every other key, unchanged."""

    @classmethod
    def from_model_config(cls, config: RobertaPreLayerNormConfig) -> GenerationConfig:
        """The defaults of a model without a `generation_config.json`: old files keep some in `config.json`."""
        own = {name: value for name, value in config.extra.items() if name in _FIELDS}
        return cls.from_dict(own)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **overrides: Any) -> GenerationConfig:
        """Build one from the content of a `generation_config.json`, `overrides` winning."""
        given = {**values, **overrides}
        made = cls(**{name: value for name, value in given.items() if name in _FIELDS})
        made.extra = {name: value for name, value in given.items() if name not in _FIELDS}
        made.validate()
        return made

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **overrides: Any) -> GenerationConfig:
        """Read one from a directory or a file.

        Raises:
            FileNotFoundError: when there is none.
            ConfigError: when it is no JSON object or breaks a rule.
        """
        file = Path(path)
        file = file / GENERATION_CONFIG_FILE if file.is_dir() else file
        try:
            return cls.from_dict(read_json(file), **overrides)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from error

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write `generation_config.json` into a directory, made if it is not there."""
        from roberta_pln.checkpoint import atomic

        Path(directory).mkdir(parents=True, exist_ok=True)
        with atomic.writing(Path(directory) / GENERATION_CONFIG_FILE) as file:
            file.write(self.to_json_string().encode())

    def to_dict(self) -> dict[str, Any]:
        """Every key that is not the default."""
        default = GenerationConfig()
        own = {name: getattr(self, name) for name in _FIELDS if getattr(self, name) != getattr(default, name)}
        return {**own, **self.extra}

    def to_json_string(self) -> str:
        """`generation_config.json` as text: sorted keys, two spaces of indent, a final newline."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def validate(self) -> None:
        """Check every value by itself; what fits together is checked by `plan`."""
        for name, (rule, holds) in _RULES.items():
            value = getattr(self, name)
            if not (value is None and name in _OPTIONAL) and not holds(value):
                raise ConfigError(f"{name} must be {rule}, got {value!r}")


_FIELDS: Final = tuple(item.name for item in fields(GenerationConfig) if item.name != "extra")


def _integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return _integer(value) or (isinstance(value, float | np.floating) and math.isfinite(value))


def _ids(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(_integer(item) and item >= 0 for item in value)


def _id_or_ids(value: Any) -> bool:
    return (_integer(value) and value >= 0) or (_ids(value) and len(value) > 0)


_WHOLE = ("an integer of at least 0", lambda value: _integer(value) and value >= 0)
_POSITIVE_WHOLE = ("an integer of at least 1", lambda value: _integer(value) and value >= 1)
_POSITIVE = ("a number above 0", lambda value: _number(value) and value > 0)
_SHARE = ("a number above 0 and at most 1", lambda value: _number(value) and 0 < value <= 1)
_SWITCH = ("True or False", lambda value: isinstance(value, bool))
_TOKEN = ("the id of a token, at least 0", lambda value: _integer(value) and value >= 0)
_TOKENS = ("a list of ids of tokens", _ids)
_TOKEN_OR_TOKENS = ("the id of a token, or a list of some", _id_or_ids)
_RULES: Final[dict[str, tuple[str, Any]]] = {
    **dict.fromkeys(("max_length", "max_new_tokens", "num_beams", "num_return_sequences"), _POSITIVE_WHOLE),
    **dict.fromkeys(("min_length", "min_new_tokens", "top_k", "no_repeat_ngram_size"), _WHOLE),
    **dict.fromkeys(("temperature", "repetition_penalty"), _POSITIVE),
    **dict.fromkeys(("top_p", "typical_p"), _SHARE),
    **dict.fromkeys(("do_sample", "use_cache", "output_scores", "output_logits", "return_dict_in_generate"), _SWITCH),
    **dict.fromkeys(("forced_bos_token_id", "pad_token_id", "bos_token_id"), _TOKEN),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), _TOKENS),
    **dict.fromkeys(("forced_eos_token_id", "eos_token_id"), _TOKEN_OR_TOKENS),
    "min_p": ("a number from 0 to 1", lambda value: _number(value) and 0 <= value <= 1),
    "length_penalty": ("a number", _number),
    "early_stopping": ('True, False or "never"', lambda value: isinstance(value, bool) or value == "never"),
    "bad_words_ids": (
        "a list of lists of ids of tokens, none of them empty",
        lambda value: isinstance(value, list | tuple) and all(_ids(word) and word for word in value),
    ),
}
_OPTIONAL: Final = {item.name for item in fields(GenerationConfig) if "None" in str(item.type) or item.type == "Ids"}

_ABSENT: Final[dict[str, tuple[Any, ...]]] = {
    "num_beam_groups": (1,),
    "diversity_penalty": (0.0,),
    "penalty_alpha": (0.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "exponential_decay_length_penalty": (),
    "forced_decoder_ids": (),
    "sequence_bias": (),
    "guidance_scale": (1.0,),
    "constraints": (),
    "force_words_ids": (),
    "renormalize_logits": (False,),
    "remove_invalid_values": (False,),
    "watermarking_config": (),
    "token_healing": (False,),
    "low_memory": (False,),
    "dola_layers": (),
    "prompt_lookup_num_tokens": (),
    "assistant_model": (),
    "prefix_allowed_tokens_fn": (),
    "negative_prompt_ids": (),
    "negative_prompt_attention_mask": (),
    "custom_generate": (),
    "stop_strings": (),
    "max_time": (),
    "cache_implementation": ("dynamic", "static"),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "synced_gpus": (False,),
}
"""What transformers has and this library has not, with the values, beside None, that change nothing."""

_OF_SAMPLING: Final = ("temperature", "top_k", "top_p", "min_p", "typical_p")
_OF_BEAMS: Final = ("early_stopping", "length_penalty")


@dataclass(frozen=True)
class Plan:
    """What every step of one generation does. Hashable, so that a backend keeps compiled code by it.

    Attributes:
        vocab_size: V.
        pad: fills rows that have ended.
        eos: the tokens that end a row.
        do_sample, num_beams, num_return_sequences, use_cache, early_stopping, length_penalty: see `GenerationConfig`.
        temperature, top_k, top_p, min_p, typical_p: the warpers of sampling; each None where it changes nothing.
        repetition_penalty, no_repeat_ngram_size: None where they change nothing.
        bad_words: sequences that do not come; those of one token are among `suppress`.
        suppress: tokens that never come.
        begin_suppress: tokens that do not come at step `begin`.
        begin: 0, or 1 behind a forced first token.
        forced_first: the token that comes first.
        forced_last: the tokens of which one comes at the last step.
        output_scores, output_logits: what is returned of every step.
    """

    vocab_size: int
    pad: int
    eos: tuple[int, ...]
    do_sample: bool
    num_beams: int
    num_return_sequences: int
    use_cache: bool
    early_stopping: bool | str
    length_penalty: float
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    no_repeat_ngram_size: int | None
    bad_words: tuple[tuple[int, ...], ...]
    suppress: tuple[int, ...]
    begin_suppress: tuple[int, ...]
    begin: int
    forced_first: int | None
    forced_last: tuple[int, ...]
    output_scores: bool
    output_logits: bool

    @property
    def rows(self) -> int:
        """Rows that are continued for each prompt."""
        return self.num_beams if self.num_beams > 1 else self.num_return_sequences

    @property
    def least_kept(self) -> int:
        """Tokens that every warper leaves; a beam search needs one that does not end."""
        return max(2, 1 + len(self.eos)) if self.num_beams > 1 else 1

    @property
    def candidates(self) -> int:
        """Continuations that a beam search looks at for each prompt: so many that `num_beams` of them do not end."""
        return max(2, 1 + len(self.eos)) * self.num_beams


class Lengths(NamedTuple):
    """How long the continuations become; compiled code takes them as numbers."""

    most: int
    least: int


class Request(NamedTuple):
    """One call of `generate`, settled."""

    plan: Plan
    lengths: Lengths
    bos: int | None
    as_record: bool


def plan(
    config: RobertaPreLayerNormConfig,
    defaults: GenerationConfig | None,
    given: GenerationConfig | None,
    options: Mapping[str, Any],
    tokens: int,
) -> Request:
    """Settle what one call asks for.

    Args:
        config: the model's.
        defaults: the model's, from its `generation_config.json`.
        given: the call's, instead of the defaults.
        options: fields of the config that the call names, which win; None is a value where a field may be None, and
            says nothing elsewhere.
        tokens: columns of the prompts; 0 where there are none.

    Raises:
        InputError: when the model is no decoder, an option is unknown or not supported, two contradict each other,
            an id is no token, or no token is allowed.
        ConfigError: when a value by itself breaks a rule.
    """
    if not config.is_decoder:
        raise InputError("generate continues texts with a decoder: set is_decoder=True in the config, got False")
    named = {name: value for name, value in options.items() if value is not None}
    unset = {name: None for name in options if name in _OPTIONAL and name not in named}
    unknown = sorted(set(named) - set(_FIELDS) - set(_ABSENT))
    if unknown:
        raise InputError(f"generate has no option {', '.join(unknown)}; it has {', '.join(_FIELDS)}")
    base = given or defaults or GenerationConfig()
    merged = GenerationConfig.from_dict({**base.to_dict(), **named, **unset})
    for name, neutral in _ABSENT.items():
        value = merged.extra.get(name)
        if value is not None and value not in neutral:
            raise InputError(f"{name}={value!r} is not supported: leave it out. There is {', '.join(_FIELDS)}")
    _check_conflicts(merged, named)
    eos = _token_ids(config.eos_token_id if merged.eos_token_id is None else merged.eos_token_id)
    pad = config.pad_token_id if merged.pad_token_id is None else merged.pad_token_id
    bos = config.bos_token_id if merged.bos_token_id is None else merged.bos_token_id
    lengths = _lengths(merged, named, tokens)
    words = tuple(
        tuple(map(int, word)) for word in merged.bad_words_ids or () if tuple(word) not in {(e,) for e in eos}
    )
    single = tuple(word[0] for word in words if len(word) == 1)
    forced_first = merged.forced_bos_token_id if max(tokens, 1) == 1 else None
    settled = Plan(
        vocab_size=config.vocab_size,
        pad=pad,
        eos=eos,
        do_sample=merged.do_sample,
        num_beams=merged.num_beams,
        num_return_sequences=merged.num_return_sequences,
        use_cache=merged.use_cache and config.num_hidden_layers > 0,  # without layers there is nothing to keep
        early_stopping=merged.early_stopping,
        length_penalty=float(merged.length_penalty),
        temperature=_unless(merged.temperature, 1) if merged.do_sample else None,
        top_k=min(merged.top_k, config.vocab_size) if merged.do_sample and merged.top_k else None,
        top_p=_unless(merged.top_p, 1) if merged.do_sample else None,
        min_p=_unless(merged.min_p, 0) if merged.do_sample else None,
        typical_p=_unless(merged.typical_p, 1) if merged.do_sample else None,
        repetition_penalty=_unless(merged.repetition_penalty, 1),
        no_repeat_ngram_size=merged.no_repeat_ngram_size or None,
        bad_words=tuple(word for word in words if len(word) > 1),
        suppress=tuple(sorted({*single, *_token_ids(merged.suppress_tokens)})),
        begin_suppress=_token_ids(merged.begin_suppress_tokens),
        begin=0 if forced_first is None else 1,
        forced_first=forced_first,
        forced_last=_token_ids(merged.forced_eos_token_id),
        output_scores=merged.output_scores,
        output_logits=merged.output_logits,
    )
    _check_tokens(settled, merged, bos)
    return Request(settled, lengths, bos, merged.return_dict_in_generate)


def _token_ids(value: Ids) -> tuple[int, ...]:
    if value is None:
        return ()
    return (int(value),) if _integer(value) else tuple(map(int, value))  # type: ignore[arg-type]


def _unless(value: float | None, neutral: float) -> float | None:
    return None if value is None or value == neutral else float(value)


def _lengths(merged: GenerationConfig, named: Mapping[str, Any], tokens: int) -> Lengths:
    tokens = max(tokens, 1)  # a text without a prompt starts with bos
    by_length = merged.max_new_tokens is None or ("max_length" in named and "max_new_tokens" not in named)
    most = merged.max_length - tokens if by_length else merged.max_new_tokens
    if most is None or most < 1:
        raise InputError(
            f"max_length ({merged.max_length}) counts the prompt, whose {tokens} tokens leave no room: set "
            f"max_new_tokens, or a greater max_length"
        )
    least = max(merged.min_length - tokens, merged.min_new_tokens or 0)
    if least > most:
        raise InputError(
            f"min_length ({merged.min_length}) and min_new_tokens ({merged.min_new_tokens}) ask for {least} new "
            f"tokens at least, and there are {most} at most"
        )
    return Lengths(most, least)


def _check_conflicts(merged: GenerationConfig, named: Mapping[str, Any]) -> None:
    """Options of one call that contradict each other; what a file says beside them only has no effect."""
    if "max_length" in named and "max_new_tokens" in named:
        raise InputError(
            f"max_length={named['max_length']} counts the prompt and max_new_tokens={named['max_new_tokens']} does "
            f"not: give one of them"
        )
    for names, holds, needed in (
        (_OF_SAMPLING, merged.do_sample, "do_sample=True"),
        (_OF_BEAMS, merged.num_beams > 1, "num_beams above 1"),
    ):
        idle = [name for name in names if name in named and named[name] != getattr(GenerationConfig, name)]
        if idle and not holds:
            raise InputError(f"{', '.join(idle)} has an effect with {needed} only: set that, or leave it out")
    count, beams = merged.num_return_sequences, merged.num_beams
    if count > max(beams, 1) and (beams > 1 or not merged.do_sample):
        raise InputError(
            f"num_return_sequences ({count}) must be at most num_beams ({beams}) without sampling: there are no more "
            f"different continuations"
        )


def _check_tokens(settled: Plan, merged: GenerationConfig, bos: int | None) -> None:
    """Every id names a token, and some token is left to choose."""
    size = settled.vocab_size
    for name in ("suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id"):
        _check_range(name, _token_ids(getattr(merged, name)), size)
    _check_range("bad_words_ids", tuple(token for word in merged.bad_words_ids or () for token in word), size)
    for name, ids in (("eos_token_id", settled.eos), ("pad_token_id", (settled.pad,)), ("bos_token_id", (bos,))):
        if getattr(merged, name) is not None:
            _check_range(name, tuple(token for token in ids if token is not None), size)
    for name, banned in (
        ("suppress_tokens and bad_words_ids", settled.suppress),
        ("suppress_tokens, bad_words_ids and begin_suppress_tokens", (*settled.suppress, *settled.begin_suppress)),
    ):
        if len(set(banned)) >= size:
            raise InputError(f"{name} forbid all {size} tokens of the vocabulary: leave some")
    if settled.num_beams > 1 and settled.candidates > settled.num_beams * size:
        raise InputError(f"num_beams={settled.num_beams} needs a vocabulary of more than {size} tokens")


def _check_range(name: str, ids: tuple[int, ...], size: int) -> None:
    wrong = [token for token in ids if not 0 <= token < size]
    if wrong:
        raise InputError(f"{name} must be at least 0 and below vocab_size ({size}), got {wrong[0]}")


# ------------------------------------------------------------- prompts


class Prompt(NamedTuple):
    """Prompts in rows of one length, each token at the end of its row and padding in front; arrays of NumPy.

    Attributes:
        ids: (B, S) int64; None for embeddings.
        embeds: (B, S, D), or None.
        real: (B, S) bool, where there is a token to attend to.
        positions: (B, S) int64, as the model's forward gives them to the prompts as they were.
        next_position: (B,) int64, of the first new token.
        shown: (B, T) int64, what is returned in front of the new tokens; no columns for embeddings.
    """

    ids: np.ndarray | None
    embeds: np.ndarray | None
    real: np.ndarray
    positions: np.ndarray
    next_position: np.ndarray
    shown: np.ndarray


def arrange(
    config: RobertaPreLayerNormConfig,
    request: Request,
    input_ids: np.ndarray | None,
    inputs_embeds: np.ndarray | None,
    attention_mask: np.ndarray | None,
    batch: int = 1,
    multiple: int = 1,
) -> Prompt:
    """Put prompts into rows that all end with a token.

    Args:
        config: the model's.
        request: what `plan` returned.
        input_ids: (B, T) integers; None or no columns starts every row with the bos token.
        inputs_embeds: (B, T, D) instead.
        attention_mask: (B, T), 1 for tokens and 0 for padding; without it the pad tokens are padding unless they end
            texts, and no row of embeddings has any.
        batch: rows, where neither ids nor embeddings say.
        multiple: S becomes a multiple of this, so that prompts of nearly one length share compiled code.

    Raises:
        InputError: when shapes do not fit, an id is no token, a row has no token, or the continuation would leave the
            position table.
    """
    if inputs_embeds is not None and input_ids is not None:
        raise InputError("You cannot specify both input_ids and inputs_embeds at the same time")
    if inputs_embeds is not None and (inputs_embeds.ndim != 3 or inputs_embeds.shape[2] != config.hidden_size):
        raise InputError(f"inputs_embeds must have shape (B, T, {config.hidden_size}), got {inputs_embeds.shape}")
    by_ids, pad = inputs_embeds is None, config.pad_token_id
    prompts = _ids_or_bos(config, request, input_ids, batch) if inputs_embeds is None else inputs_embeds
    shape = prompts.shape[:2]
    tokens = prompts != pad if by_ids else np.ones(shape, bool)  # of embeddings nobody sees which are padding
    if attention_mask is None or attention_mask.size == 0:
        real = np.ones(shape, bool) if pad in request.plan.eos else tokens
    else:
        real = np.asarray(attention_mask) > 0
    if real.shape != shape:
        raise InputError(f"attention_mask must have shape {shape}, got {real.shape}")
    empty = np.flatnonzero(~real.any(axis=1))
    if empty.size:
        raise InputError(
            f"every prompt needs a token to continue; row {empty[0]} is padding only: start it with the bos token"
        )
    positions = tokens.cumsum(axis=1) * tokens + pad
    next_position = pad + 1 + tokens.sum(axis=1)

    columns = shape[1]
    last = columns - 1 - real[:, ::-1].argmax(axis=1)  # of each row the last token
    first = int((columns - 1 - last + real.argmax(axis=1)).min())  # columns in front that no row needs
    _check_room(config, request.lengths, next_position, columns - first)
    order = (np.arange(columns)[None] + last[:, None] + 1) % columns  # trailing padding comes to the front
    padding = -(columns - first) % multiple

    def turned(array: np.ndarray, value: float) -> np.ndarray:
        rest = array.ndim - 2
        array = np.take_along_axis(array, order.reshape(*shape, *(1,) * rest), axis=1)[:, first:]
        return np.pad(array, ((0, 0), (padding, 0), *((0, 0),) * rest), constant_values=value)

    return Prompt(
        ids=turned(prompts, pad) if by_ids else None,
        embeds=None if by_ids else turned(prompts, 0.0),
        real=turned(real, False),
        positions=turned(positions, pad),
        next_position=next_position,
        shown=prompts if by_ids else np.zeros((shape[0], 0), np.int64),
    )


def arrange_in_buckets(
    config: RobertaPreLayerNormConfig,
    request: Request,
    input_ids: np.ndarray | None,
    inputs_embeds: np.ndarray | None,
    attention_mask: np.ndarray | None,
    batch: int,
    bucket: int,
) -> tuple[Prompt, int]:
    """The prompts in a multiple of `bucket` slots, and how many slots to have for new tokens, also a multiple.

    Both are exact where relative positions would not reach over all slots. The other arguments are those of `arrange`.
    """
    arranged = partial(arrange, config, request, input_ids, inputs_embeds, attention_mask, batch)
    prompt, room = arranged(bucket), -(-request.lengths.most // bucket) * bucket
    relative = config.position_embedding_type != "absolute"
    if relative and prompt.real.shape[1] + room > config.max_position_embeddings:
        return arranged(), request.lengths.most
    return prompt, room


def _ids_or_bos(
    config: RobertaPreLayerNormConfig, request: Request, input_ids: np.ndarray | None, batch: int
) -> np.ndarray:
    if input_ids is not None and (input_ids.ndim != 2 or input_ids.dtype.kind not in "iu") and input_ids.size:
        raise InputError(f"input_ids must be integers of shape (B, T), got {input_ids.dtype} {input_ids.shape}")
    if input_ids is None or input_ids.size == 0:
        if request.bos is None:
            raise InputError("a text without a prompt starts with bos_token_id, which is None: give input_ids")
        rows = batch if input_ids is None else max(len(input_ids), 1)
        return np.full((rows, 1), request.bos, np.int64)
    input_ids = input_ids.astype(np.int64)
    lowest, highest = int(input_ids.min()), int(input_ids.max())
    if lowest < 0 or highest >= config.vocab_size:
        seen = lowest if lowest < 0 else highest
        raise InputError(f"input_ids must be at least 0 and below vocab_size ({config.vocab_size}), got {seen}")
    return input_ids


def _check_room(config: RobertaPreLayerNormConfig, lengths: Lengths, next_position: np.ndarray, columns: int) -> None:
    """The whole text fits the position table."""
    if config.position_embedding_type == "absolute":
        used, limit = int(next_position.max()) - config.pad_token_id - 1, config.max_sequence_length
    else:
        used, limit = columns, config.max_position_embeddings
    if used + lengths.most > limit:
        raise InputError(
            f"prompt and continuation must have at most {limit} tokens together: the prompt has {used}, which leaves "
            f"room for {max(limit - used, 0)} new ones, and {lengths.most} are asked for. Lower max_new_tokens (or "
            f"max_length), shorten the prompt, or use a checkpoint with a longer position table"
        )


def check_draws(draws: np.ndarray, wanted: tuple[int, ...]) -> None:
    """Draws that are handed in are uniform in [0, 1), one for each row (or candidate) of each step."""
    if draws.shape != wanted:
        raise InputError(f"draws must have shape {wanted}, got {draws.shape}")
    if not ((draws >= 0) & (draws < 1)).all():
        raise InputError("draws must be at least 0 and below 1")


def failure(step: int, not_a_number: bool) -> InputError:
    """What to raise when no token can be chosen at a step."""
    if not_a_number:
        return InputError(f"the logits of new token {step} are not numbers: the weights or the inputs are not finite")
    return InputError(
        f"no token is allowed as new token {step}: the processors (suppress_tokens, bad_words_ids, "
        f"no_repeat_ngram_size, min_length, ...) forbid all of them"
    )


def check_extras(
    settled: Plan, stopping_criteria: Any, streamer: Any, seed: Any, generator: Any, draws: Any, prng_key: Any = None
) -> None:
    """What a call gives beside the options goes with them.

    Raises:
        InputError: when it has no effect, or two sources of chance are given.
    """
    beams = settled.num_beams > 1
    for name, value in (("stopping_criteria", stopping_criteria), ("streamer", streamer)):
        if value and beams:
            raise InputError(
                f"{name} sees texts that grow at their end only, which a beam search does not: leave it out"
            )
    given = {"seed": seed, "generator": generator, "prng_key": prng_key, "draws": draws}
    sources = [name for name, value in given.items() if value is not None]
    if len(sources) > 1:
        raise InputError(f"{' and '.join(sources)} are two sources of chance: give one of them")
    if sources and not settled.do_sample:
        raise InputError(f"{sources[0]} has an effect with do_sample=True only: set that, or leave it out")


class Stream:
    """Hands tokens out as they come: to a function, or to an object with `put` and `end`.

    Args:
        target: either, or None.
        prompts: gives the first to be handed out.
    """

    def __init__(self, target: Any, prompts: Callable[[], Any]) -> None:
        self._put = getattr(target, "put", target)
        self._end = getattr(target, "end", None)
        self.put(prompts)

    def put(self, tokens: Callable[[], Any]) -> None:
        """Hand out what the function gives, which is not called without a target."""
        if self._put is not None:
            self._put(tokens())

    def end(self) -> None:
        """Say that there is no more."""
        if self._end is not None:
            self._end()
