"""Generation: the loop that feeds a decoder its own tokens."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from roberta_pln import generation
from roberta_pln.checks import InputError
from roberta_pln.generation import GenerationConfig, Lengths, Plan, Prompt
from roberta_pln.outputs import GenerateOutput
from roberta_pln.pt import cache, policy
from roberta_pln.pt.packed import packed

Processor = Callable[[Tensor, Tensor], Tensor]
"""Token ids so far (R, L) and scores (R, V) to scores (R, V), as in transformers."""
Criterion = Callable[[Tensor, Tensor], Tensor | bool]
"""Token ids so far (R, L) and scores (R, V) to whether rows have ended, (R,) or all alike, as in transformers."""


class Generation:
    """What a causal language model can do beyond a call."""

    generation_config: GenerationConfig

    @torch.inference_mode()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Sequence[Processor] | None = None,
        stopping_criteria: Sequence[Criterion] | None = None,
        streamer: Any = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        draws: Any = None,
        compiled: bool = True,
        **options: Any,
    ) -> Tensor | GenerateOutput:
        """Continue prompts.

        The positions are those of the forward, whatever the padding: every greedy token is the most likely one by a
        call on the tokens so far. The model is in evaluation mode meanwhile.

        Args:
            inputs, input_ids: (B, T) token ids of the prompts, padded on either side; without them each text starts
                with the bos token.
            generation_config: instead of the model's own `generation_config`.
            logits_processor: further rules, `(input_ids, scores) -> scores`, after those of the options.
            stopping_criteria: `(input_ids, scores) -> rows that have ended`; not for a beam search.
            streamer: called with the tokens (R,) of each step as NumPy arrays, first with the prompts; or an object
                with `put` and `end`. Not for a beam search.
            attention_mask: (B, T) with 1 for tokens and 0 for padding; without it, pad tokens are padding.
            inputs_embeds: (B, T, D) instead of token ids; the result then holds the new tokens only.
            encoder_hidden_states, encoder_attention_mask: those of the forward, for every step.
            seed: what is drawn from, for sampling; PyTorch's own generator if neither this nor `generator` is given.
            generator: drawn from instead.
            draws: uniform numbers in [0, 1) used instead of drawn ones: (N, R) for N new tokens of R rows, or
                (N, B, beams * V) in a beam search.
            compiled: whether linear layers use a faster kernel where there is one, for which their weights are laid out
                in the first call; see `packed`.
            options: fields of `GenerationConfig`, which win over it.

        Returns:
            (R, T + new tokens) token ids; `num_return_sequences` rows for each prompt. With
            `return_dict_in_generate=True` a `GenerateOutput`.

        Raises:
            InputError: when the model is no decoder, the options contradict each other or are not supported, the
                text would leave the position table, no token is allowed, or logits are not numbers.
            ConfigError: when an option's value breaks its rule.
        """
        if inputs is not None and input_ids is not None:
            raise InputError("inputs and input_ids are two names of the prompts: give one of them")
        ids, embeds, mask = (
            self.array(value) for value in (inputs if inputs is not None else input_ids, inputs_embeds, attention_mask)
        )
        columns = next((array.shape[1] for array in (ids, embeds) if array is not None and array.ndim > 1), 0)
        request = generation.plan(self.config, self.generation_config, generation_config, options, columns)
        plan = request.plan
        generation.check_extras(plan, stopping_criteria, streamer, seed, generator, draws)
        batch = 1 if encoder_hidden_states is None else len(encoder_hidden_states)
        prompt = generation.arrange(self.config, request, ids, embeds, mask, batch)
        training = self.training
        self.eval()
        try:
            decoder = Decoder(self, plan, request.lengths, prompt, encoder_hidden_states, encoder_attention_mask)
            source = Draws(plan, len(prompt.real), seed, generator, draws, request.lengths, self.device, decoder.dtype)
            search = beam_search if plan.num_beams > 1 else token_by_token
            with packed(self, len(decoder.rows)) if compiled else nullcontext():
                found = search(decoder, source, logits_processor or (), stopping_criteria or (), streamer)
        finally:
            self.train(training)
        record = finish(plan, prompt, found)
        return record if request.as_record else record.sequences

    def array(self, value: Any) -> np.ndarray | None:
        """An argument of `generate` in NumPy."""
        if value is None:
            return None
        tensor = self.tensor(value).detach().cpu()
        return tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


class Decoder:
    """A model with the texts that it continues.

    Attributes:
        sequences: (R, L) token ids in slots, pad tokens where there is none yet.
        real: (R, L) bool, the slots that hold a token to attend to; all those of new tokens are.
        start: the slot of the first new token.
    """

    def __init__(
        self,
        model: Any,
        plan: Plan,
        lengths: Lengths,
        prompt: Prompt,
        encoder_hidden_states: Tensor | None,
        encoder_attention_mask: Tensor | None,
    ) -> None:
        self.model, self.plan, self.lengths = model, plan, lengths
        device = model.device
        batch, self.start = prompt.real.shape
        self.rows = torch.arange(batch, device=device).repeat_interleave(plan.rows)
        self.dtype = policy.widened(torch.empty(0, dtype=model.dtype)).dtype

        def slots(array: np.ndarray, value: int | bool) -> Tensor:
            tensor = torch.from_numpy(array).to(device)
            return torch.nn.functional.pad(tensor, (0, lengths.most), value=value)[self.rows]

        ids = np.full(prompt.real.shape, plan.pad) if prompt.ids is None else prompt.ids
        self.sequences, self.real = slots(ids, plan.pad), slots(prompt.real, True)
        self.positions = slots(prompt.positions, model.config.pad_token_id)
        self.next_position = torch.from_numpy(prompt.next_position).to(device)[self.rows]
        self.embeds = None if prompt.embeds is None else model.states(prompt.embeds)
        self.encoder = {
            "encoder_hidden_states": model.states(encoder_hidden_states),
            "encoder_attention_mask": model.tensor(encoder_attention_mask),
        }
        self.past: Any = None

    def first(self) -> Tensor:
        """The logits of the first new token, (R, V), from a call on the prompts."""
        prompts = slice(None, None, self.plan.rows)  # the rows that are continued from one prompt are alike here
        positions, mask = self.positions[prompts, : self.start], self.real[prompts, : self.start]
        ids = self.sequences[prompts, : self.start] if self.embeds is None else None
        record = self.call(ids, self.embeds, mask, positions, self.encoder, None)
        if self.plan.use_cache:
            self.past = cache.with_room(record.past_key_values, self.sequences.shape[1], self.rows)
        self.encoder = {name: None if value is None else value[self.rows] for name, value in self.encoder.items()}
        return self.logits(record)[self.rows]

    def put(self, tokens: Tensor, step: int) -> None:
        """Write the token of a step, (R,)."""
        slot, pad = self.start + step, self.model.config.pad_token_id
        self.sequences[:, slot] = tokens
        self.positions[:, slot] = torch.where(tokens == pad, pad, self.next_position)
        self.next_position = self.next_position + (tokens != pad)

    def next(self, step: int) -> Tensor:
        """The logits behind the token of a step, (R, V)."""
        end = self.start + step + 1
        if self.plan.use_cache:
            ids, positions = self.sequences[:, end - 1 : end], self.positions[:, end - 1 : end]
            record = self.call(ids, None, self.real[:, :end], positions, self.encoder, self.past)
            self.past = record.past_key_values
            return self.logits(record)
        if self.embeds is None:
            ids, embeds = self.sequences[:, :end], None
        else:
            table = self.model.get_input_embeddings()
            ids, embeds = None, torch.cat((self.embeds[self.rows], table(self.sequences[:, self.start : end])), dim=1)
        return self.logits(self.call(ids, embeds, self.real[:, :end], self.positions[:, :end], self.encoder, None))

    def reorder(self, rows: Tensor) -> None:
        """Let every row continue another one, before its token is put."""
        self.positions, self.next_position = self.positions[rows], self.next_position[rows]
        if self.past is not None:
            cache.reorder(self.past, rows)

    def call(
        self, ids: Tensor | None, embeds: Tensor | None, mask: Tensor, positions: Tensor, encoder: dict, past: Any
    ) -> Any:
        """Call the base model."""
        return self.model.roberta_prelayernorm(
            ids,
            mask,
            position_ids=positions,
            inputs_embeds=embeds,
            past_key_values=past,
            use_cache=self.plan.use_cache,
            output_attentions=False,
            output_hidden_states=False,
            return_dict=True,
            **encoder,
        )

    def logits(self, record: Any) -> Tensor:
        """The logits of the last token of each row, (R, V)."""
        return policy.widened(self.model.lm_head(record.last_hidden_state[:, -1]))


class Draws:
    """Where the uniform numbers of sampling come from: drawn, or handed in. There are none without sampling."""

    def __init__(
        self,
        plan: Plan,
        batch: int,
        seed: int | None,
        generator: torch.Generator | None,
        draws: Any,
        lengths: Lengths,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.plan, self.device, self.dtype = plan, device, dtype
        beams = plan.num_beams > 1
        self.shape = (batch, plan.num_beams * plan.vocab_size) if beams else (batch * plan.rows,)
        self.generator = torch.Generator(device).manual_seed(seed) if seed is not None else generator
        self.given = None
        if draws is not None:
            array = np.asarray(draws)
            generation.check_draws(array, (lengths.most, *self.shape))
            self.given = torch.from_numpy(array).to(device, dtype)

    def at(self, step: int) -> Tensor | None:
        """The draws of a step."""
        if not self.plan.do_sample:
            return None
        if self.given is not None:
            return self.given[step]
        return torch.rand(self.shape, generator=self.generator, dtype=self.dtype, device=self.device)


def token_by_token(
    decoder: Decoder, draws: Draws, processors: Sequence[Processor], criteria: Sequence[Criterion], streamer: Any
) -> dict[str, Any]:
    """Greedy search, or sampling: every row takes one token at each step."""
    plan, lengths = decoder.plan, decoder.lengths
    ended = torch.zeros(len(decoder.rows), dtype=torch.bool, device=decoder.rows.device)
    log_probs: list[Tensor] = []
    kept = Kept(plan)
    stream = generation.Stream(streamer, lambda: decoder.sequences[:, : decoder.start].cpu().numpy())
    logits = decoder.first()
    for step in range(lengths.most):
        length = decoder.start + step
        scores = allowed(decoder, logits, processors, ended, length, step)
        kept.add(scores, logits)
        tokens = torch.where(ended, plan.pad, policy.choose(plan, scores, draws.at(step)))
        gained = scores.log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0]
        log_probs.append(torch.where(ended, 0.0, gained))
        decoder.put(tokens, step)
        stream.put(tokens.cpu().numpy)
        ended = ended | torch.isin(tokens, tokens.new_tensor(plan.eos))
        for criterion in criteria:
            said = criterion(decoder.sequences[:, : length + 1], scores)
            ended = ended | torch.as_tensor(said, dtype=torch.bool, device=ended.device)
        if step + 1 == lengths.most or ended.all():
            break
        logits = decoder.next(step)
    stream.end()
    log_probs = torch.stack(log_probs, dim=1)
    new = decoder.sequences[:, decoder.start : decoder.start + log_probs.shape[1]]
    return {"new": new, "sequences_scores": log_probs.sum(dim=1), "log_probs": log_probs, **kept.fields()}


def beam_search(
    decoder: Decoder, draws: Draws, processors: Sequence[Processor], criteria: Sequence[Criterion], streamer: Any
) -> dict[str, Any]:
    """Beam search, or beam sampling."""
    plan, lengths = decoder.plan, decoder.lengths
    kept = Kept(plan)
    sequences = decoder.sequences.unflatten(0, (-1, plan.num_beams))
    beams = policy.start(plan, sequences, lengths.most, decoder.dtype)
    logits = decoder.first()
    for step in range(lengths.most):
        length = decoder.start + step
        dead = torch.isinf(beams.scores).flatten()
        scores = allowed(decoder, logits.log_softmax(dim=-1), processors, dead, length, step)
        kept.add(scores, logits)
        beams, rows, tokens = policy.advance(plan, lengths, beams, scores, draws.at(step), length, step)
        decoder.reorder(rows)
        decoder.sequences = beams.sequences.flatten(0, 1)
        decoder.put(tokens, step)
        if step + 1 == lengths.most or not beams.going:
            break
        logits = decoder.next(step)
    origins = beams.ended_origins[:, : plan.num_return_sequences].flatten(0, 1)
    new = int((origins >= 0).sum(dim=1).max())
    return {
        "new": beams.ended_sequences[:, : plan.num_return_sequences].flatten(0, 1)[:, decoder.start :][:, :new],
        "sequences_scores": beams.ended_scores[:, : plan.num_return_sequences].flatten(),
        "log_probs": beams.ended_log_probs[:, : plan.num_return_sequences].flatten(0, 1)[:, :new],
        **kept.fields(),
        "beam_indices": origins[:, :new],
    }


def allowed(
    decoder: Decoder, scores: Tensor, processors: Sequence[Processor], ended: Tensor, length: int, step: int
) -> Tensor:
    """The scores of the tokens that may come, -inf for others.

    Raises:
        InputError: when scores are not numbers, or a row that has not ended may take no token.
    """
    plan, sequences = decoder.plan, decoder.sequences
    if (scores.isnan().any(dim=-1) & ~ended).any():
        raise generation.failure(step, not_a_number=True)
    scores = policy.process(plan, decoder.lengths, scores, sequences, decoder.real, length, step)
    for processor in processors:
        scores = processor(sequences[:, :length], scores)
    scores = policy.warp(plan, scores)
    if ((scores == -torch.inf).all(dim=-1) & ~ended).any():
        raise generation.failure(step, not_a_number=False)
    return scores


class Kept:
    """What is returned of every step."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.scores: list[Tensor] = []
        self.logits: list[Tensor] = []

    def add(self, scores: Tensor, logits: Tensor) -> None:
        """Keep what is asked for."""
        if self.plan.output_scores:
            self.scores.append(scores)
        if self.plan.output_logits:
            self.logits.append(logits)

    def fields(self) -> dict[str, tuple[Tensor, ...] | None]:
        """The fields of the record."""
        return {"scores": tuple(self.scores) or None, "logits": tuple(self.logits) or None}


def finish(plan: Plan, prompt: Prompt, found: dict[str, Any]) -> GenerateOutput:
    """The record, with the prompts as they were given in front of the new tokens."""
    new = found.pop("new")
    rows = plan.num_return_sequences
    shown = torch.from_numpy(prompt.shown).to(new.device).repeat_interleave(rows, dim=0)
    return GenerateOutput(torch.cat((shown, new), dim=1), **found)
