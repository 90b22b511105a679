"""The records that models return, the same in all three backends.

Axis letters, here and in every shape comment: B batch, T query tokens, S key tokens (T plus the cache), D hidden,
H heads, K head size, F intermediate, V vocabulary, L labels, C choices, N layers.

A record is read by attribute, by key or by index. A field whose value is None is left out of keys, indices, slices,
iteration and length, and reads None as an attribute; so with labels `record[0]` is the loss. Every backend registers
the records with its own tree utilities when it is imported, so they pass through `torch.compile`, `torch.export`,
`tf.function`, Keras, `jax.jit` and `jax.grad`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

Array = Any
"""A tensor of the backend in use."""


@dataclass(eq=False)
class ModelOutput:
    """Base of all records."""

    def keys(self) -> tuple[str, ...]:
        """Names of the fields that are present, in order."""
        return tuple(item.name for item in fields(self) if getattr(self, item.name) is not None)

    def to_tuple(self) -> tuple[Any, ...]:
        """Values of the fields that are present, in order."""
        return tuple(getattr(self, name) for name in self.keys())

    values = to_tuple

    def plain(self) -> tuple[Any, ...]:
        """What a call with `return_dict=False` returns."""
        return self.to_tuple()

    def items(self) -> tuple[tuple[str, Any], ...]:
        """Pairs of name and value of the fields that are present."""
        return tuple((name, getattr(self, name)) for name in self.keys())

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a field, or `default` when it is absent."""
        return getattr(self, name) if name in self.keys() else default

    def named_arrays(self) -> Iterator[tuple[str, Array]]:
        """Every array with its name; items of a tuple are numbered, as in `hidden_states.0`, those of a dict named."""
        for name, value in self.items():
            yield from _named(name, value)

    def __getitem__(self, key: str | int | slice) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self.keys():
            raise KeyError(f"{type(self).__name__} has no {key!r}; it has {', '.join(self.keys())}")
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    # TensorFlow's nest walks dataclasses that have these two.

    def __tf_flatten__(self) -> tuple[tuple[str, ...], tuple[Any, ...]]:
        return self.keys(), self.to_tuple()

    @classmethod
    def __tf_unflatten__(cls, names: tuple[str, ...], values: tuple[Any, ...]) -> ModelOutput:
        return cls(**dict(zip(names, values, strict=True)))


def _named(name: str, value: Any) -> Iterator[tuple[str, Array]]:
    if not isinstance(value, tuple | dict):
        yield name, value
        return
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _named(f"{name}.{key}", item)


@dataclass(eq=False)
class BaseModelOutput(ModelOutput):
    """What the base model returns. In TensorFlow the cache comes before the hidden states."""

    last_hidden_state: Array  # (B, T, D), after the final LayerNorm
    pooler_output: Array | None = None  # (B, D), tanh of a dense layer over the first token
    hidden_states: tuple[Array, ...] | None = None  # N + 1 items (B, T, D): embeddings, then each layer; no final norm
    past_key_values: Any | None = None  # the decoder's cache, in the backend's own form
    attentions: tuple[Array, ...] | None = None  # N items (B, H, T, S), after dropout and head mask
    cross_attentions: tuple[Array, ...] | None = None  # N items (B, H, T, encoder tokens)

    def plain(self) -> tuple[Any, ...]:
        """As transformers has it: None in place of a pooler that is not there, and the cache before the states."""
        rest = (self.past_key_values, self.hidden_states, self.attentions, self.cross_attentions)
        return (self.last_hidden_state, self.pooler_output, *(value for value in rest if value is not None))


@dataclass(eq=False)
class MaskedLMOutput(ModelOutput):
    """What the masked language model returns."""

    loss: Array | None = None  # (), mean cross entropy over the labels that are not -100; NaN if there is none
    logits: Array | None = None  # (B, T, V), unnormalised log-probabilities
    hidden_states: tuple[Array, ...] | None = None  # N + 1 items (B, T, D)
    attentions: tuple[Array, ...] | None = None  # N items (B, H, T, T)


@dataclass(eq=False)
class CausalLMOutput(ModelOutput):
    """What the causal language model returns."""

    loss: Array | None = None  # (), mean cross entropy of each next token, labels of -100 left out; NaN if all are
    logits: Array | None = None  # (B, T, V), unnormalised log-probabilities of the next token
    past_key_values: Any | None = None  # the cache, in the backend's own form
    hidden_states: tuple[Array, ...] | None = None  # N + 1 items (B, T, D)
    attentions: tuple[Array, ...] | None = None  # N items (B, H, T, S)
    cross_attentions: tuple[Array, ...] | None = None  # N items (B, H, T, encoder tokens)


@dataclass(eq=False)
class GenerateOutput(ModelOutput):
    """What `generate` returns with `return_dict_in_generate=True`. R rows: those of each prompt follow each other."""

    sequences: Array  # (R, T + new tokens), prompts as given; rows that have ended are filled with the pad token
    sequences_scores: Array | None = None  # (R,), sum of log_probs; of a beam divided by its length ** length_penalty
    log_probs: Array | None = None  # (R, new tokens), of each token, as the processors left it; 0 behind the end
    scores: tuple[Array, ...] | None = None  # of every step (rows continued, V), as the processors left them
    logits: tuple[Array, ...] | None = None  # of every step (rows continued, V), as the model gave them
    beam_indices: Array | None = None  # (R, new tokens), the row that each token of a beam continued; -1 behind the end


@dataclass(eq=False)
class SequenceClassifierOutput(ModelOutput):
    """What the sequence classifier returns."""

    loss: Array | None = None  # (), by `problem_type`: squared error, cross entropy, or binary cross entropy; a mean
    logits: Array | None = None  # (B, L), unnormalised log-probabilities, or values of a regression
    hidden_states: tuple[Array, ...] | None = None  # N + 1 items (B, T, D)
    attentions: tuple[Array, ...] | None = None  # N items (B, H, T, T)


@dataclass(eq=False)
class MultipleChoiceOutput(ModelOutput):
    """What the multiple-choice model returns."""

    loss: Array | None = None  # (), mean cross entropy over the choices; NaN if every label is -100
    logits: Array | None = None  # (B, C), unnormalised log-probabilities of the choices
    hidden_states: tuple[Array, ...] | None = None  # N + 1 items (B * C, T, D)
    attentions: tuple[Array, ...] | None = None  # N items (B * C, H, T, T)


@dataclass(eq=False)
class TokenClassifierOutput(ModelOutput):
    """What the token classifier returns."""

    loss: Array | None = None  # (), mean cross entropy over the labels that are not -100; NaN if there is none
    logits: Array | None = None  # (B, T, L), unnormalised log-probabilities
    hidden_states: tuple[Array, ...] | None = None  # N + 1 items (B, T, D)
    attentions: tuple[Array, ...] | None = None  # N items (B, H, T, T)


@dataclass(eq=False)
class QuestionAnsweringOutput(ModelOutput):
    """What the question-answering model returns."""

    loss: Array | None = None  # (), mean of the cross entropies of start and end; positions outside are left out
    start_logits: Array | None = None  # (B, T), unnormalised log-probabilities that the answer starts at a token
    end_logits: Array | None = None  # (B, T), and that it ends there
    hidden_states: tuple[Array, ...] | None = None  # N + 1 items (B, T, D)
    attentions: tuple[Array, ...] | None = None  # N items (B, H, T, T)


RECORDS = (
    BaseModelOutput,
    CausalLMOutput,
    GenerateOutput,
    MaskedLMOutput,
    SequenceClassifierOutput,
    MultipleChoiceOutput,
    TokenClassifierOutput,
    QuestionAnsweringOutput,
)
"""All records, for the backends to register."""
