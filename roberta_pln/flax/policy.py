"""Which token comes next: what the processors allow, what sampling draws, how beams are scored. Pure functions.

Axis letters beside those of the records: R rows that are continued, L slots of a row (prompt and continuation), N new
tokens at most, K beams of each of the B prompts, C candidates of a beam search. `step` counts new tokens from 0.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from roberta_pln.flax.attention import softmax_dtype
from roberta_pln.generation import Lengths, Plan

# ------------------------------------------------------------- processors


def process(
    plan: Plan, lengths: Lengths, scores: Array, sequences: Array, real: Array, length: Array, step: Array
) -> Array:
    """Scores with -inf for the tokens that are not allowed.

    Args:
        plan: what is asked for.
        lengths: of the continuations.
        scores: (R, V) logits, or log-probabilities in a beam search, in at least float32.
        sequences: (R, L) the tokens so far, in the first `length` slots.
        real: (R, L) bool, the slots with a token that is not padding.
        length: slots that are taken.
        step: number of the token to come.
    """
    if plan.repetition_penalty is not None:
        there = seen(sequences, real & (jnp.arange(real.shape[1], dtype=jnp.int32) < length), plan.vocab_size)
        scores = penalise(scores, there, plan.repetition_penalty)
    if plan.no_repeat_ngram_size is not None:
        scores = forbid(scores, repeating(sequences, real, length, plan.no_repeat_ngram_size, plan.vocab_size))
    for *prefix, token in plan.bad_words:
        said = ends_with(sequences, real, length, prefix)
        scores = forbid(scores, said[:, None] & among(scores, (token,)))
    scores = forbid(scores, among(scores, plan.eos) & (step < lengths.least))
    if plan.forced_first is not None:
        scores = jnp.where(step == 0, force(scores, (plan.forced_first,)), scores)
    if plan.forced_last:
        scores = jnp.where(step == lengths.most - 1, force(scores, plan.forced_last), scores)
    if plan.suppress:
        scores = forbid(scores, among(scores, plan.suppress))
    if plan.begin_suppress:
        scores = forbid(scores, among(scores, plan.begin_suppress) & (step == plan.begin))
    return scores


def among(scores: Array, tokens: tuple[int, ...]) -> Array:
    """(V,) bool, true for some tokens."""
    return jnp.zeros(scores.shape[-1], bool).at[np.array(tokens, np.int32)].set(True)


def forbid(scores: Array, forbidden: Array) -> Array:
    """Scores with -inf where tokens are forbidden, (R, V) or (V,)."""
    return jnp.where(forbidden, -math.inf, scores)


def force(scores: Array, tokens: tuple[int, ...]) -> Array:
    """Scores that leave nothing but some tokens, all alike."""
    return forbid(jnp.zeros_like(scores), ~among(scores, tokens))


def seen(sequences: Array, chosen: Array, vocab_size: int) -> Array:
    """(R, V) bool, the tokens that are in some slots of each row."""
    rows = np.arange(len(sequences))[:, None]
    return jnp.zeros((len(sequences), vocab_size), bool).at[rows, sequences].max(chosen)


def penalise(scores: Array, there: Array, penalty: float) -> Array:
    """Scores that are lower for tokens that are there."""
    return jnp.where(there, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def repeating(sequences: Array, real: Array, length: Array, size: int, vocab_size: int) -> Array:
    """(R, V) bool, the tokens that would repeat a sequence of `size` tokens."""
    count = sequences.shape[1] - size + 1
    if count < 1:
        return jnp.zeros((len(sequences), vocab_size), bool)
    alike = jnp.arange(count, dtype=jnp.int32) + size <= length  # (count,) windows that are filled
    alike = alike & real[:, size - 1 :]
    for i in range(size - 1):
        last = jnp.maximum(length - size + 1 + i, 0)
        alike = alike & (sequences[:, i : i + count] == sequences[:, last, None])
        alike = alike & real[:, i : i + count] & real[:, last, None]
    return seen(sequences[:, size - 1 :], alike, vocab_size)


def ends_with(sequences: Array, real: Array, length: Array, tokens: list[int]) -> Array:
    """(R,) bool, the rows whose last tokens are these."""
    said = jnp.broadcast_to(length >= len(tokens), len(sequences))
    for i, token in enumerate(reversed(tokens), start=1):
        slot = jnp.maximum(length - i, 0)
        said = said & (sequences[:, slot] == token) & real[:, slot]
    return said


# ------------------------------------------------------------- sampling


def warp(plan: Plan, scores: Array) -> Array:
    """Scores (R, V) with -inf for the tokens that are not drawn from."""
    if plan.temperature is not None:
        scores = scores / plan.temperature
    if plan.top_k is not None:
        count = max(plan.top_k, plan.least_kept)
        scores = forbid(scores, scores < jax.lax.top_k(scores, min(count, plan.vocab_size))[0][:, -1:])
    if plan.top_p is not None:
        scores = keep_nucleus(scores, -scores, plan.top_p, plan.least_kept)
    if plan.min_p is not None:
        probabilities = jax.nn.softmax(scores, axis=-1)
        unlikely = probabilities < plan.min_p * probabilities.max(axis=-1, keepdims=True)
        scores = forbid(scores, unlikely & ~highest(scores, plan.least_kept))
    if plan.typical_p is not None:
        logs = jax.nn.log_softmax(scores, axis=-1)
        entropy = -jnp.nansum(jnp.exp(logs) * logs, axis=-1, keepdims=True)
        scores = keep_nucleus(scores, jnp.abs(-logs - entropy), plan.typical_p, plan.least_kept)
    return scores


def keep_nucleus(scores: Array, order: Array, share: float, least: int) -> Array:
    """Keep the first tokens, from the lowest `order` up, whose probabilities add up to a share."""
    ranked = order.argsort(axis=-1, stable=True)
    probabilities = pick(jax.nn.softmax(scores, axis=-1), ranked)
    before = probabilities.cumsum(axis=-1) - probabilities
    kept = (before < share) | (jnp.arange(scores.shape[-1], dtype=jnp.int32) < least)
    return forbid(scores, ~jnp.zeros(kept.shape, bool).at[np.arange(len(kept))[:, None], ranked].set(kept))


def highest(scores: Array, count: int) -> Array:
    """(R, V) bool, the tokens with the highest scores."""
    chosen = top(scores, min(count, scores.shape[-1]))
    return jnp.zeros(scores.shape, bool).at[np.arange(len(scores))[:, None], chosen].set(True)


def choose(plan: Plan, scores: Array, draws: Array | None) -> Array:
    """The next token of each row, (R, V) -> (R,).

    Args:
        plan: what is asked for.
        scores: as `process` and `warp` left them.
        draws: (R,) uniform in [0, 1), for sampling: the token is where the summed probabilities pass the draw.
    """
    if draws is None:
        return scores.argmax(axis=-1).astype(jnp.int32)
    probabilities = jax.nn.softmax(scores, axis=-1)
    summed = probabilities.cumsum(axis=-1)
    passed = (summed <= draws[:, None] * summed[:, -1:]).sum(axis=-1, dtype=jnp.int32)
    last = scores.shape[-1] - 1 - (probabilities > 0)[:, ::-1].argmax(axis=-1).astype(jnp.int32)
    return jnp.minimum(passed, last)  # rounding may put a draw near 1 behind the last token


# ------------------------------------------------------------- beams


class Beams(NamedTuple):
    """The running beams of a search and the best that have ended; those that are not there yet score -inf."""

    sequences: Array  # (B, K, L)
    scores: Array  # (B, K) summed log-probabilities, best first
    log_probs: Array  # (B, K, N) of each new token
    origins: Array  # (B, K, N) the row that each new token continued, -1 where there is none
    ended_sequences: Array  # (B, K, L)
    ended_scores: Array  # (B, K) divided by length ** length_penalty
    ended_log_probs: Array  # (B, K, N)
    ended_origins: Array  # (B, K, N)
    ended: Array  # (B, K) bool, whether there is one
    improvable: Array  # (B,) bool, whether a running beam may still beat those that have ended
    going: Array  # () bool, whether the search goes on


def start(plan: Plan, sequences: Array, new: int, dtype: DTypeLike) -> Beams:
    """The state before the first step: one beam for each prompt. Sequences are (B, K, L)."""
    batch, beams, _ = sequences.shape
    scores = jnp.full((batch, beams), -math.inf, dtype)
    log_probs = jnp.zeros((batch, beams, new), dtype)
    origins = jnp.full((batch, beams, new), -1, jnp.int32)
    no = jnp.zeros((batch, beams), bool)
    yes = jnp.ones(batch, bool)
    running = jnp.where(jnp.arange(beams, dtype=jnp.int32) == 0, 0.0, scores)
    return Beams(sequences, running, log_probs, origins, sequences, scores, log_probs, origins, no, yes, yes.any())


def advance(
    plan: Plan, lengths: Lengths, beams: Beams, scores: Array, draws: Array | None, length: Array, step: Array
) -> tuple[Beams, Array, Array]:
    """One step of a beam search.

    Args:
        plan: what is asked for.
        lengths: of the continuations.
        beams: the state.
        scores: (R, V) log-probabilities of the next token, as `process` and `warp` left them; R = B * K.
        draws: (B, K * V) uniform in [0, 1), for sampling: candidates are drawn without replacement.
        length: slots that are taken.
        step: number of the token to come.

    Returns:
        The state, and of the running beams the rows that they continue and their tokens, each (R,).
    """
    count, vocab_size = plan.num_beams, plan.vocab_size
    batch = len(beams.scores)
    total = (scores.reshape(batch, count, vocab_size) + beams.scores[..., None]).reshape(batch, count * vocab_size)
    order = total if draws is None else total - jnp.log(-jnp.log1p(-jnp.maximum(draws, jnp.finfo(draws.dtype).tiny)))
    order = top(order, plan.candidates)  # (B, C), best first
    values = pick(total, order)
    parents, tokens = order // vocab_size, order % vocab_size
    rows = parents + count * jnp.arange(batch, dtype=jnp.int32)[:, None]

    at_length = jnp.arange(beams.sequences.shape[2], dtype=jnp.int32) == length
    at_step = jnp.arange(beams.origins.shape[2], dtype=jnp.int32) == step
    gained = pick(scores.reshape(total.shape), order)
    found = (
        jnp.where(at_length, tokens[..., None], pick(beams.sequences, parents)),
        jnp.where(at_step, gained[..., None], pick(beams.log_probs, parents)),
        jnp.where(at_step, rows[..., None], pick(beams.origins, parents)),
    )

    ends = jnp.isin(tokens, np.array(plan.eos, np.int32)) | (step == lengths.most - 1)
    kept = top(forbid(values, ends), count)
    running_scores = pick(forbid(values, ends), kept)

    first = jnp.arange(plan.candidates, dtype=jnp.int32) < count
    full = beams.ended.all(axis=1) & (plan.early_stopping is True)
    new = ends & first & (beams.improvable & ~full)[:, None]
    passed = jnp.asarray(step + 1, values.dtype) ** plan.length_penalty
    merged = jnp.concatenate((beams.ended_scores, forbid(values / passed, ~new)), axis=1)
    best = top(merged, count)
    earlier = (beams.ended_sequences, beams.ended_log_probs, beams.ended_origins)
    ended_sequences, ended_log_probs, ended_origins = (
        pick(jnp.concatenate(pair, axis=1), best) for pair in zip(earlier, found, strict=True)
    )
    ended_scores, ended = pick(merged, best), pick(jnp.concatenate((beams.ended, new), axis=1), best)

    hoped = lengths.most if plan.early_stopping == "never" and plan.length_penalty > 0 else step + 1
    hope = running_scores[:, :1] / jnp.asarray(hoped, values.dtype) ** plan.length_penalty
    worst = jnp.where(ended, ended_scores.min(axis=1, keepdims=True), -math.inf)
    improvable = beams.improvable & (hope > worst).any(axis=1)
    going = improvable.any() & ~ends.all() & ~(ended.all() & (plan.early_stopping is True))
    sequences, log_probs, origins = (pick(array, kept) for array in found)
    state = Beams(
        sequences,
        running_scores,
        log_probs,
        origins,
        ended_sequences,
        ended_scores,
        ended_log_probs,
        ended_origins,
        ended,
        improvable,
        going,
    )
    return state, pick(rows, kept).reshape(-1), pick(tokens, kept).reshape(-1)


def top(scores: Array, count: int) -> Array:
    """Where the highest scores are, best first, (B, M) -> (B, count); of equals the first."""
    return jax.lax.top_k(scores, count)[1]


def pick(array: Array, indices: Array) -> Array:
    """Items of axis 1, another choice for each row: (B, M, ...) and (B, J) -> (B, J, ...)."""
    return array[np.arange(len(array))[:, None], indices]


def widened(logits: Array) -> Array:
    """Logits in the type that scores are computed in: at least float32."""
    return logits.astype(softmax_dtype(logits.dtype))
