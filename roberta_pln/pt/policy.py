"""Which token comes next: what the processors allow, what sampling draws, how beams are scored. Pure functions.

Axis letters beside those of the records: R rows that are continued, L slots of a row (prompt and continuation), N new
tokens at most, K beams of each of the B prompts, C candidates of a beam search. `step` counts new tokens from 0.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from roberta_pln.generation import Lengths, Plan
from roberta_pln.pt.attention import softmax_dtype

# ------------------------------------------------------------- processors


def process(
    plan: Plan, lengths: Lengths, scores: Tensor, sequences: Tensor, real: Tensor, length: int, step: int
) -> Tensor:
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
        there = seen(sequences[:, :length], real[:, :length], plan.vocab_size)
        scores = penalise(scores, there, plan.repetition_penalty)
    if plan.no_repeat_ngram_size is not None:
        scores = forbid(scores, repeating(sequences, real, length, plan.no_repeat_ngram_size, plan.vocab_size))
    for *prefix, token in plan.bad_words:
        said = ends_with(sequences, real, length, prefix)
        scores = forbid(scores, said[:, None] & among(scores, (token,)))
    if step < lengths.least:
        scores = forbid(scores, among(scores, plan.eos))
    if plan.forced_first is not None and step == 0:
        scores = force(scores, (plan.forced_first,))
    if plan.forced_last and step == lengths.most - 1:
        scores = force(scores, plan.forced_last)
    if plan.suppress:
        scores = forbid(scores, among(scores, plan.suppress))
    if plan.begin_suppress and step == plan.begin:
        scores = forbid(scores, among(scores, plan.begin_suppress))
    return scores


def among(scores: Tensor, tokens: tuple[int, ...]) -> Tensor:
    """(V,) bool, true for some tokens."""
    chosen = torch.zeros(scores.shape[-1], dtype=torch.bool, device=scores.device)
    chosen[list(tokens)] = True
    return chosen


def forbid(scores: Tensor, forbidden: Tensor) -> Tensor:
    """Scores with -inf where tokens are forbidden, (R, V) or (V,)."""
    return torch.where(forbidden, -math.inf, scores)


def force(scores: Tensor, tokens: tuple[int, ...]) -> Tensor:
    """Scores that leave nothing but some tokens, all alike."""
    return torch.where(among(scores, tokens), 0.0, -math.inf).to(scores.dtype).expand_as(scores)


def seen(sequences: Tensor, chosen: Tensor, vocab_size: int) -> Tensor:
    """(R, V) bool, the tokens that are in some slots of each row."""
    counts = sequences.new_zeros(len(sequences), vocab_size)
    return counts.scatter_add(1, sequences, chosen.to(sequences.dtype)) > 0


def penalise(scores: Tensor, there: Tensor, penalty: float) -> Tensor:
    """Scores that are lower for tokens that are there."""
    return torch.where(there, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def repeating(sequences: Tensor, real: Tensor, length: int, size: int, vocab_size: int) -> Tensor:
    """(R, V) bool, the tokens that would repeat a sequence of `size` tokens."""
    count = sequences.shape[1] - size + 1
    if length < size or count < 1:
        return torch.zeros(len(sequences), vocab_size, dtype=torch.bool, device=sequences.device)
    alike = torch.arange(count, device=sequences.device) + size <= length  # (count,) windows that are filled
    alike = alike & real[:, size - 1 :]
    for i in range(size - 1):
        last = length - size + 1 + i
        alike = alike & (sequences[:, i : i + count] == sequences[:, last, None])
        alike = alike & real[:, i : i + count] & real[:, last, None]
    return seen(sequences[:, size - 1 :], alike, vocab_size)


def ends_with(sequences: Tensor, real: Tensor, length: int, tokens: list[int]) -> Tensor:
    """(R,) bool, the rows whose last tokens are these."""
    if length < len(tokens):
        return torch.zeros(len(sequences), dtype=torch.bool, device=sequences.device)
    matches = [
        (sequences[:, length - i] == token) & real[:, length - i] for i, token in enumerate(reversed(tokens), start=1)
    ]
    return torch.stack(matches).all(dim=0)


# ------------------------------------------------------------- sampling


def warp(plan: Plan, scores: Tensor) -> Tensor:
    """Scores (R, V) with -inf for the tokens that are not drawn from."""
    if plan.temperature is not None:
        scores = scores / plan.temperature
    if plan.top_k is not None:
        count = max(plan.top_k, plan.least_kept)
        scores = forbid(scores, scores < scores.topk(min(count, plan.vocab_size)).values[:, -1:])
    if plan.top_p is not None:
        scores = keep_nucleus(scores, -scores, plan.top_p, plan.least_kept)
    if plan.min_p is not None:
        probabilities = scores.softmax(dim=-1)
        unlikely = probabilities < plan.min_p * probabilities.amax(dim=-1, keepdim=True)
        scores = forbid(scores, unlikely & ~highest(scores, plan.least_kept))
    if plan.typical_p is not None:
        logs = scores.log_softmax(dim=-1)
        entropy = -(logs.exp() * logs).nansum(dim=-1, keepdim=True)
        scores = keep_nucleus(scores, (-logs - entropy).abs(), plan.typical_p, plan.least_kept)
    return scores


def keep_nucleus(scores: Tensor, order: Tensor, share: float, least: int) -> Tensor:
    """Keep the first tokens, from the lowest `order` up, whose probabilities add up to a share."""
    ranked = order.argsort(dim=-1, stable=True)
    probabilities = scores.softmax(dim=-1).gather(1, ranked)
    before = probabilities.cumsum(dim=-1) - probabilities
    kept = (before < share) | (torch.arange(scores.shape[-1], device=scores.device) < least)
    return forbid(scores, ~torch.zeros_like(kept).scatter(1, ranked, kept))


def highest(scores: Tensor, count: int) -> Tensor:
    """(R, V) bool, the tokens with the highest scores."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, top(scores, min(count, scores.shape[-1])), True)


def choose(plan: Plan, scores: Tensor, draws: Tensor | None) -> Tensor:
    """The next token of each row, (R, V) -> (R,).

    Args:
        plan: what is asked for.
        scores: as `process` and `warp` left them.
        draws: (R,) uniform in [0, 1), for sampling: the token is where the summed probabilities pass the draw.
    """
    if draws is None:
        return scores.argmax(dim=-1)
    probabilities = scores.softmax(dim=-1)
    summed = probabilities.cumsum(dim=-1)
    passed = (summed <= draws[:, None] * summed[:, -1:]).sum(dim=-1)
    last = scores.shape[-1] - 1 - (probabilities > 0).flip(-1).to(torch.uint8).argmax(dim=-1)
    return torch.minimum(passed, last)  # rounding may put a draw near 1 behind the last token


# ------------------------------------------------------------- beams


class Beams(NamedTuple):
    """The running beams of a search and the best that have ended; those that are not there yet score -inf."""

    sequences: Tensor  # (B, K, L)
    scores: Tensor  # (B, K) summed log-probabilities, best first
    log_probs: Tensor  # (B, K, N) of each new token
    origins: Tensor  # (B, K, N) the row that each new token continued, -1 where there is none
    ended_sequences: Tensor  # (B, K, L)
    ended_scores: Tensor  # (B, K) divided by length ** length_penalty
    ended_log_probs: Tensor  # (B, K, N)
    ended_origins: Tensor  # (B, K, N)
    ended: Tensor  # (B, K) bool, whether there is one
    improvable: Tensor  # (B,) bool, whether a running beam may still beat those that have ended
    going: Tensor  # () bool, whether the search goes on


def start(plan: Plan, sequences: Tensor, new: int, dtype: torch.dtype) -> Beams:
    """The state before the first step: one beam for each prompt. Sequences are (B, K, L)."""
    batch, beams, _ = sequences.shape
    device = sequences.device
    scores = torch.full((batch, beams), -math.inf, dtype=dtype, device=device)
    log_probs = torch.zeros(batch, beams, new, dtype=dtype, device=device)
    origins = torch.full((batch, beams, new), -1, device=device)
    no = torch.zeros(batch, beams, dtype=torch.bool, device=device)
    yes = torch.ones(batch, dtype=torch.bool, device=device)
    running = torch.where(torch.arange(beams, device=device) == 0, 0.0, scores)
    return Beams(sequences, running, log_probs, origins, sequences, scores, log_probs, origins, no, yes, yes.any())


def advance(
    plan: Plan, lengths: Lengths, beams: Beams, scores: Tensor, draws: Tensor | None, length: int, step: int
) -> tuple[Beams, Tensor, Tensor]:
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
    total = (scores.unflatten(0, (batch, count)) + beams.scores[..., None]).flatten(1)  # (B, K * V)
    order = total if draws is None else total - torch.log(-torch.log1p(-draws.clamp(min=torch.finfo(draws.dtype).tiny)))
    order = top(order, plan.candidates)  # (B, C), best first
    values = total.gather(1, order)
    parents, tokens = order // vocab_size, order % vocab_size
    rows = parents + count * torch.arange(batch, device=order.device)[:, None]

    at_length = torch.arange(beams.sequences.shape[2], device=order.device) == length
    at_step = torch.arange(beams.origins.shape[2], device=order.device) == step
    gained = scores.reshape(total.shape).gather(1, order)
    found = (
        torch.where(at_length, tokens[..., None], pick(beams.sequences, parents)),
        torch.where(at_step, gained[..., None], pick(beams.log_probs, parents)),
        torch.where(at_step, rows[..., None], pick(beams.origins, parents)),
    )

    ends = torch.isin(tokens, tokens.new_tensor(plan.eos)) | (step == lengths.most - 1)
    kept = top(forbid(values, ends), count)
    running_scores = pick(forbid(values, ends), kept)

    first = torch.arange(plan.candidates, device=order.device) < count
    full = beams.ended.all(dim=1) & (plan.early_stopping is True)
    new = ends & first & (beams.improvable & ~full)[:, None]
    merged = torch.cat((beams.ended_scores, forbid(values / (step + 1) ** plan.length_penalty, ~new)), dim=1)
    best = top(merged, count)
    earlier = (beams.ended_sequences, beams.ended_log_probs, beams.ended_origins)
    ended_sequences, ended_log_probs, ended_origins = (
        pick(torch.cat(pair, dim=1), best) for pair in zip(earlier, found, strict=True)
    )
    ended_scores, ended = pick(merged, best), pick(torch.cat((beams.ended, new), dim=1), best)

    hoped = lengths.most if plan.early_stopping == "never" and plan.length_penalty > 0 else step + 1
    hope = running_scores[:, :1] / hoped**plan.length_penalty
    worst = torch.where(ended, ended_scores.amin(dim=1, keepdim=True), -math.inf)
    improvable = beams.improvable & (hope > worst).any(dim=1)
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
    return state, pick(rows, kept).flatten(), pick(tokens, kept).flatten()


def top(scores: Tensor, count: int) -> Tensor:
    """Where the highest scores are, best first, (B, M) -> (B, count); of equals the first, where topk takes any."""
    values, indices = scores.topk(count)
    if ((scores >= values[:, -1:]).sum(dim=-1) > count).any():  # the last has equals that were left out
        return scores.argsort(dim=-1, descending=True, stable=True)[:, :count]
    indices = indices.sort(dim=-1).values
    return indices.gather(1, scores.gather(1, indices).argsort(dim=-1, descending=True, stable=True))


def pick(array: Tensor, indices: Tensor) -> Tensor:
    """Items of axis 1, another choice for each row: (B, M, ...) and (B, J) -> (B, J, ...)."""
    return array[torch.arange(len(array), device=array.device)[:, None], indices]


def widened(logits: Tensor) -> Tensor:
    """Logits in the type that scores are computed in: at least float32."""
    return logits.to(softmax_dtype(logits.dtype))
