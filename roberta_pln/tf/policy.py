"""Which token comes next: what the processors allow, what sampling draws, how beams are scored. Pure functions.

Axis letters beside those of the records: R rows that are continued, L slots of a row (prompt and continuation), N new
tokens at most, K beams of each of the B prompts, C candidates of a beam search. `step` counts new tokens from 0.
"""

import math
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from roberta_pln.generation import Lengths, Plan
from roberta_pln.tf.attention import softmax_dtype

# ------------------------------------------------------------- processors


def process(
    plan: Plan,
    lengths: Lengths,
    scores: tf.Tensor,
    sequences: tf.Tensor,
    real: tf.Tensor,
    length: tf.Tensor,
    step: tf.Tensor,
) -> tf.Tensor:
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
        taken = real & (tf.range(real.shape[1]) < length)
        scores = penalise(scores, seen(sequences, taken, plan.vocab_size), plan.repetition_penalty)
    if plan.no_repeat_ngram_size is not None:
        scores = forbid(scores, repeating(sequences, real, length, plan.no_repeat_ngram_size, plan.vocab_size))
    for *prefix, token in plan.bad_words:
        said = ends_with(sequences, real, length, prefix)
        scores = forbid(scores, said[:, None] & among(scores, (token,)))
    scores = forbid(scores, (step < lengths.least) & among(scores, plan.eos))
    if plan.forced_first is not None:
        scores = tf.where(step == 0, force(scores, (plan.forced_first,)), scores)
    if plan.forced_last:
        scores = tf.where(step == lengths.most - 1, force(scores, plan.forced_last), scores)
    if plan.suppress:
        scores = forbid(scores, among(scores, plan.suppress))
    if plan.begin_suppress:
        scores = forbid(scores, (step == plan.begin) & among(scores, plan.begin_suppress))
    return scores


def among(scores: tf.Tensor, tokens: tuple[int, ...]) -> tf.Tensor:
    """(V,) bool, true for some tokens."""
    return tf.constant(np.isin(np.arange(scores.shape[-1]), tokens))


def forbid(scores: tf.Tensor, forbidden: tf.Tensor) -> tf.Tensor:
    """Scores with -inf where tokens are forbidden, (R, V) or (V,)."""
    return tf.where(forbidden, tf.constant(-math.inf, scores.dtype), scores)


def force(scores: tf.Tensor, tokens: tuple[int, ...]) -> tf.Tensor:
    """Scores that leave nothing but some tokens, all alike."""
    return forbid(tf.zeros_like(scores), ~among(scores, tokens))


def seen(sequences: tf.Tensor, chosen: tf.Tensor, vocab_size: int) -> tf.Tensor:
    """(R, V) bool, the tokens that are in some slots of each row."""
    rows = sequences.shape[0]
    counts = tf.zeros((rows, vocab_size), tf.int32)
    places = tf.stack((tf.zeros_like(sequences) + tf.range(rows, dtype=sequences.dtype)[:, None], sequences), axis=-1)
    return tf.tensor_scatter_nd_add(counts, places, tf.cast(chosen, tf.int32)) > 0


def penalise(scores: tf.Tensor, there: tf.Tensor, penalty: float) -> tf.Tensor:
    """Scores that are lower for tokens that are there."""
    return tf.where(there, tf.where(scores < 0, scores * penalty, scores / penalty), scores)


def repeating(sequences: tf.Tensor, real: tf.Tensor, length: tf.Tensor, size: int, vocab_size: int) -> tf.Tensor:
    """(R, V) bool, the tokens that would repeat a sequence of `size` tokens."""
    count = sequences.shape[1] - size + 1
    if count < 1:
        return tf.zeros((sequences.shape[0], vocab_size), tf.bool)
    alike = (tf.range(count) + size <= length) & (length >= size)  # (count,) windows that are filled
    alike = alike & real[:, size - 1 :]
    for i in range(size - 1):
        last = tf.maximum(length - size + 1 + i, 0)
        alike = alike & (sequences[:, i : i + count] == tf.gather(sequences, last, axis=1)[:, None])
        alike = alike & real[:, i : i + count] & tf.gather(real, last, axis=1)[:, None]
    return seen(sequences[:, size - 1 :], alike, vocab_size)


def ends_with(sequences: tf.Tensor, real: tf.Tensor, length: tf.Tensor, tokens: list[int]) -> tf.Tensor:
    """(R,) bool, the rows whose last tokens are these."""
    matches = []
    for i, token in enumerate(reversed(tokens), start=1):
        slot = tf.maximum(length - i, 0)
        matches.append((tf.gather(sequences, slot, axis=1) == token) & tf.gather(real, slot, axis=1) & (length >= i))
    return tf.reduce_all(tf.stack(matches), axis=0)


# ------------------------------------------------------------- sampling


def warp(plan: Plan, scores: tf.Tensor) -> tf.Tensor:
    """Scores (R, V) with -inf for the tokens that are not drawn from."""
    if plan.temperature is not None:
        scores = scores / plan.temperature
    if plan.top_k is not None:
        count = max(plan.top_k, plan.least_kept)
        scores = forbid(scores, scores < tf.math.top_k(scores, min(count, plan.vocab_size)).values[:, -1:])
    if plan.top_p is not None:
        scores = keep_nucleus(scores, -scores, plan.top_p, plan.least_kept)
    if plan.min_p is not None:
        probabilities = tf.nn.softmax(scores)
        unlikely = probabilities < plan.min_p * tf.reduce_max(probabilities, axis=-1, keepdims=True)
        scores = forbid(scores, unlikely & ~highest(scores, plan.least_kept))
    if plan.typical_p is not None:
        logs = tf.nn.log_softmax(scores)
        entropy = -tf.reduce_sum(tf.math.multiply_no_nan(logs, tf.exp(logs)), axis=-1, keepdims=True)
        scores = keep_nucleus(scores, tf.abs(-logs - entropy), plan.typical_p, plan.least_kept)
    return scores


def keep_nucleus(scores: tf.Tensor, order: tf.Tensor, share: float, least: int) -> tf.Tensor:
    """Keep the first tokens, from the lowest `order` up, whose probabilities add up to a share."""
    ranked = tf.argsort(order, axis=-1, stable=True)
    probabilities = tf.gather(tf.nn.softmax(scores), ranked, batch_dims=1)
    before = tf.cumsum(probabilities, axis=-1) - probabilities
    kept = (before < share) | (tf.range(scores.shape[-1]) < least)
    return forbid(scores, ~seen(ranked, kept, scores.shape[-1]))


def highest(scores: tf.Tensor, count: int) -> tf.Tensor:
    """(R, V) bool, the tokens with the highest scores."""
    chosen = top(scores, min(count, scores.shape[-1]))
    return seen(chosen, tf.ones_like(chosen), scores.shape[-1])


def choose(plan: Plan, scores: tf.Tensor, draws: tf.Tensor | None) -> tf.Tensor:
    """The next token of each row, (R, V) -> (R,).

    Args:
        plan: what is asked for.
        scores: as `process` and `warp` left them.
        draws: (R,) uniform in [0, 1), for sampling: the token is where the summed probabilities pass the draw.
    """
    if draws is None:
        return tf.argmax(scores, axis=-1)
    probabilities = tf.nn.softmax(scores)
    summed = tf.cumsum(probabilities, axis=-1)
    passed = tf.reduce_sum(tf.cast(summed <= draws[:, None] * summed[:, -1:], tf.int64), axis=-1)
    last = scores.shape[-1] - 1 - tf.argmax(tf.cast(tf.reverse(probabilities > 0, [-1]), tf.int32), axis=-1)
    return tf.minimum(passed, last)  # rounding may put a draw near 1 behind the last token


# ------------------------------------------------------------- beams


class Beams(NamedTuple):
    """The running beams of a search and the best that have ended; those that are not there yet score -inf."""

    sequences: tf.Tensor  # (B, K, L)
    scores: tf.Tensor  # (B, K) summed log-probabilities, best first
    log_probs: tf.Tensor  # (B, K, N) of each new token
    origins: tf.Tensor  # (B, K, N) the row that each new token continued, -1 where there is none
    ended_sequences: tf.Tensor  # (B, K, L)
    ended_scores: tf.Tensor  # (B, K) divided by length ** length_penalty
    ended_log_probs: tf.Tensor  # (B, K, N)
    ended_origins: tf.Tensor  # (B, K, N)
    ended: tf.Tensor  # (B, K) bool, whether there is one
    improvable: tf.Tensor  # (B,) bool, whether a running beam may still beat those that have ended
    going: tf.Tensor  # () bool, whether the search goes on


def start(plan: Plan, sequences: tf.Tensor, new: int, dtype: tf.DType) -> Beams:
    """The state before the first step: one beam for each prompt. Sequences are (B, K, L)."""
    batch, beams, _ = sequences.shape
    scores = tf.fill((batch, beams), tf.constant(-math.inf, dtype))
    log_probs = tf.zeros((batch, beams, new), dtype)
    origins = tf.fill((batch, beams, new), -1)
    no = tf.zeros((batch, beams), tf.bool)
    yes = tf.ones(batch, tf.bool)
    running = tf.where(tf.range(beams) == 0, tf.zeros((), dtype), scores)
    going = tf.reduce_any(yes)
    return Beams(sequences, running, log_probs, origins, sequences, scores, log_probs, origins, no, yes, going)


def advance(
    plan: Plan,
    lengths: Lengths,
    beams: Beams,
    scores: tf.Tensor,
    draws: tf.Tensor | None,
    length: tf.Tensor,
    step: tf.Tensor,
) -> tuple[Beams, tf.Tensor, tf.Tensor]:
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
    batch, dtype = beams.scores.shape[0], scores.dtype
    total = tf.reshape(scores, (batch, count, vocab_size)) + beams.scores[..., None]
    total = tf.reshape(total, (batch, count * vocab_size))
    order = total
    if draws is not None:
        order = total - tf.math.log(-tf.math.log1p(-tf.maximum(draws, np.finfo(dtype.as_numpy_dtype).tiny)))
    order = top(order, plan.candidates)  # (B, C), best first
    values = pick(total, order)
    parents, tokens = order // vocab_size, tf.cast(order % vocab_size, beams.sequences.dtype)
    rows = parents + count * tf.range(batch)[:, None]

    at_length = tf.range(beams.sequences.shape[2]) == length
    at_step = tf.range(beams.origins.shape[2]) == step
    gained = pick(tf.reshape(scores, total.shape), order)
    found = (
        tf.where(at_length, tokens[..., None], pick(beams.sequences, parents)),
        tf.where(at_step, gained[..., None], pick(beams.log_probs, parents)),
        tf.where(at_step, rows[..., None], pick(beams.origins, parents)),
    )

    ends = tf.gather(among(scores, plan.eos), tokens) | (step == lengths.most - 1)
    kept = top(forbid(values, ends), count)
    running_scores = pick(forbid(values, ends), kept)

    first = tf.range(plan.candidates) < count
    full = tf.reduce_all(beams.ended, axis=1) & (plan.early_stopping is True)
    new = ends & first & (beams.improvable & ~full)[:, None]
    by_length = values / tf.cast(step + 1, dtype) ** plan.length_penalty
    merged = tf.concat((beams.ended_scores, forbid(by_length, ~new)), axis=1)
    best = top(merged, count)
    earlier = (beams.ended_sequences, beams.ended_log_probs, beams.ended_origins)
    ended_sequences, ended_log_probs, ended_origins = (
        pick(tf.concat(pair, axis=1), best) for pair in zip(earlier, found, strict=True)
    )
    ended_scores, ended = pick(merged, best), pick(tf.concat((beams.ended, new), axis=1), best)

    hoped = lengths.most if plan.early_stopping == "never" and plan.length_penalty > 0 else step + 1
    hope = running_scores[:, :1] / tf.cast(hoped, dtype) ** plan.length_penalty
    worst = forbid(tf.reduce_min(ended_scores, axis=1, keepdims=True), ~ended)
    improvable = beams.improvable & tf.reduce_any(hope > worst, axis=1)
    enough = tf.reduce_all(ended) & (plan.early_stopping is True)
    going = tf.reduce_any(improvable) & ~tf.reduce_all(ends) & ~enough
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
    return state, tf.reshape(pick(rows, kept), [-1]), tf.reshape(pick(tokens, kept), [-1])


def top(scores: tf.Tensor, count: int) -> tf.Tensor:
    """Where the highest scores are, best first, (B, M) -> (B, count); of equals the first."""
    return tf.math.top_k(scores, count).indices


def pick(array: tf.Tensor, indices: tf.Tensor) -> tf.Tensor:
    """Items of axis 1, another choice for each row: (B, M, ...) and (B, J) -> (B, J, ...)."""
    return tf.gather(array, indices, batch_dims=1)


def widened(logits: tf.Tensor) -> tf.Tensor:
    """Logits in the type that scores are computed in: at least float32."""
    return tf.cast(logits, softmax_dtype(logits.dtype))
