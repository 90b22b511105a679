"""Generation: the loop that feeds a decoder its own tokens, compiled as one program."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from roberta_pln import generation
from roberta_pln.checks import InputError
from roberta_pln.flax import cache, policy
from roberta_pln.flax.attention import softmax_dtype
from roberta_pln.flax.policy import Beams
from roberta_pln.generation import GenerationConfig, Lengths, Plan, Prompt
from roberta_pln.outputs import GenerateOutput

Processor = Callable[[Array, Array, Array], Array]
"""Token ids (R, L), scores (R, V) and how many slots of the ids are taken to scores (R, V), as in transformers."""
Criterion = Callable[[Array, Array], Array | bool]
"""Token ids so far (R, L) and scores (R, V) to whether rows have ended, (R,) or all alike."""

BUCKET = 32
"""Prompts, and the room behind them, become multiples of so many tokens: one compilation serves many lengths."""
PROGRAMS = 16
"""How many kinds of generation a model keeps compiled."""

NOT_A_NUMBER, NOTHING_ALLOWED = 1, 2
"""Why a generation failed; 0 if it did not."""


class Generation:
    """What a causal language model can do beyond a call."""

    generation_config: GenerationConfig

    def generate(
        self,
        inputs: Array | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Sequence[Processor] | None = None,
        stopping_criteria: Sequence[Criterion] | None = None,
        streamer: Any = None,
        *,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        inputs_embeds: Array | None = None,
        encoder_hidden_states: Array | None = None,
        encoder_attention_mask: Array | None = None,
        params: Mapping[str, Any] | None = None,
        seed: int | None = None,
        prng_key: Array | None = None,
        draws: Any = None,
        compiled: bool = True,
        **options: Any,
    ) -> GenerateOutput:
        """Continue prompts.

        The positions are those of the forward, whatever the padding: every greedy token is the most likely one by a
        call on the tokens so far.

        The loop is compiled at its first call, and again for another plan (whatever of the options is no length), other
        processors, batch, or lengths in another multiple of `BUCKET`; parameters are its arguments.

        Args:
            inputs, input_ids: (B, T) token ids of the prompts, padded on either side; without them each text starts
                with the bos token.
            generation_config: instead of the model's own `generation_config`.
            logits_processor: further rules, `(input_ids, scores, cur_len) -> scores`, after those of the options; they
                are compiled. `input_ids` has a slot for every token that may come, of which `cur_len` are taken.
            stopping_criteria: `(input_ids, scores) -> rows that have ended`; not for a beam search.
            streamer: called with the tokens (R,) of each step as NumPy arrays, first with the prompts; or an object
                with `put` and `end`. Not for a beam search.
            attention_mask: (B, T) with 1 for tokens and 0 for padding; without it, pad tokens are padding.
            inputs_embeds: (B, T, D) instead of token ids; the result then holds the new tokens only.
            encoder_hidden_states, encoder_attention_mask: those of the forward, for every step.
            params: used instead of the model's own parameters.
            seed: what is drawn from, for sampling; 0 if neither this nor `prng_key` is given.
            prng_key: drawn from instead.
            draws: uniform numbers in [0, 1) used instead of drawn ones: (N, R) for N new tokens of R rows, or
                (N, B, beams * V) in a beam search.
            compiled: `False` runs the steps one by one as they are written, to look into them.
            options: fields of `GenerationConfig`, which win over it.

        Returns:
            A `GenerateOutput` whose `sequences` are (R, T + new tokens) token ids; `num_return_sequences` rows for each
            prompt.

        Raises:
            InputError: when the model is no decoder, the options contradict each other or are not supported, the
                text would leave the position table, no token is allowed, or logits are not numbers.
            ConfigError: when an option's value breaks its rule.
            ValueError: when the model has no parameters and none are given.
        """
        if inputs is not None and input_ids is not None:
            raise InputError("inputs and input_ids are two names of the prompts: give one of them")
        ids, embeds, mask = (
            self.array(value) for value in (inputs if inputs is not None else input_ids, inputs_embeds, attention_mask)
        )
        columns = next((array.shape[1] for array in (ids, embeds) if array is not None and array.ndim > 1), 0)
        request = generation.plan(self.config, self.generation_config, generation_config, options, columns)
        plan = request.plan
        generation.check_extras(plan, stopping_criteria, streamer, seed, None, draws, prng_key)
        batch = 1 if encoder_hidden_states is None else len(encoder_hidden_states)
        prompt, room = generation.arrange_in_buckets(self.config, request, ids, embeds, mask, batch, BUCKET)
        task = Task(self.module, plan, tuple(logits_processor or ()), room)
        arguments = Arguments(
            self.params if params is None else params,
            jax.tree.map(narrow, prompt._replace(shown=None)),
            Lengths(*map(np.int32, request.lengths)),
            self.array(encoder_hidden_states),
            self.array(encoder_attention_mask),
            *chance(task, request.lengths, len(prompt.real), seed, prng_key, draws),
        )
        program = self.program(task) if compiled else Program(task, *(partial(part, task) for part in PARTS))
        criteria = stopping_criteria or ()
        if compiled and not criteria and streamer is None:
            state = program.run(arguments)
        else:
            state = run_by_step(program, arguments, criteria, streamer)
        return finish(plan, prompt, checked(state))

    def array(self, value: Any) -> np.ndarray | None:
        """An argument of `generate` in NumPy."""
        if value is None:
            return None
        if isinstance(value, jax.core.Tracer):
            raise InputError("generate looks at its arguments before it compiles its loop: call it outside of jax.jit")
        array = np.asarray(value)
        return array.astype(np.float32) if array.dtype == jnp.bfloat16 else array

    def program(self, task: "Task") -> "Program":
        """The compiled code of a task. A changed config, or another shape of the model, has code of its own."""
        programs = _PROGRAMS.setdefault(self, OrderedDict())
        key = (repr(self.config), id(task.module), task.plan, task.room, *map(id, task.processors))
        if key not in programs:
            begin, step, run = (partial(part, task) for part in PARTS)
            programs[key] = Program(task, jax.jit(begin), jax.jit(step, donate_argnums=1), jax.jit(run))
        programs.move_to_end(key)
        if len(programs) > PROGRAMS:
            programs.popitem(last=False)
        return programs[key]


class Task(NamedTuple):
    """What compiled code depends on, beside the shapes of its arguments."""

    module: nn.Module
    plan: Plan
    processors: tuple[Processor, ...]
    room: int  # N, slots for new tokens


class Arguments(NamedTuple):
    """What compiled code is called with."""

    params: Mapping[str, Any]
    prompt: Prompt
    lengths: Lengths
    encoder_hidden_states: np.ndarray | None
    encoder_attention_mask: np.ndarray | None
    key: Array | None  # what is drawn from, for sampling
    draws: np.ndarray | None  # what is used instead of drawn numbers


class Texts(NamedTuple):
    """The texts that are continued, and the model's cache of them."""

    sequences: Array  # (R, L) token ids in slots, pad tokens where there is none yet
    positions: Array  # (R, L)
    next_position: Array  # (R,) of the next token
    past: tuple[cache.LayerCache, ...] | None


class Rows(NamedTuple):
    """What is known of rows that take one token at each step."""

    ended: Array  # (R,) bool
    log_probs: Array  # (R, N) of each new token, 0 behind the end


class Kept(NamedTuple):
    """What is returned of every step; None where it is not asked for."""

    scores: Array | None  # (N, R, V)
    logits: Array | None  # (N, R, V)


class State(NamedTuple):
    """A generation between two steps."""

    step: Array  # () int32, new tokens that are there
    texts: Texts
    found: Rows | Beams
    kept: Kept
    going: Array  # () bool
    failed: Array  # () int32


class Decoder:
    """A model with the texts that it continues.

    Attributes:
        real: (R, L) bool, the slots that hold a token to attend to; all those of new tokens are.
        start: the slot of the first new token.
    """

    def __init__(self, task: Task, arguments: Arguments) -> None:
        self.task, self.plan, self.lengths, self.prompt = task, task.plan, arguments.lengths, arguments.prompt
        self.model = task.module.bind({"params": arguments.params})
        self.batch, self.start = self.prompt.real.shape
        self.dtype = softmax_dtype(task.module.dtype)
        self.real = self.slots(self.prompt.real, True)
        self.encoder = {
            "encoder_hidden_states": arguments.encoder_hidden_states,
            "encoder_attention_mask": arguments.encoder_attention_mask,
        }

    def rows(self, array: Array) -> Array:
        """What the rows of the prompts have for the rows that continue them, (B, ...) -> (R, ...)."""
        return jnp.repeat(array, self.plan.rows, axis=0)

    def slots(self, array: Array, value: int | bool) -> Array:
        """What the prompts have in their slots, (B, S), with a value in the slots of new tokens, (R, L)."""
        return self.rows(jnp.pad(array, ((0, 0), (0, self.task.room)), constant_values=value))

    def first(self) -> tuple[Texts, Array]:
        """The texts, and the logits of the first new token, (R, V), from a call on the prompts."""
        prompt, pad = self.prompt, self.task.module.config.pad_token_id
        states, past = self.call(prompt.ids, prompt.embeds, prompt.real, prompt.positions, self.encoder, None)
        ids = jnp.full(prompt.real.shape, self.plan.pad, jnp.int32) if prompt.ids is None else prompt.ids
        texts = Texts(
            self.slots(ids, self.plan.pad),
            self.slots(prompt.positions, pad),
            self.rows(prompt.next_position),
            cache.with_room(past, self.start + self.task.room, self.plan.rows) if self.plan.use_cache else None,
        )
        return texts, self.rows(self.logits(states[:, -1]))

    def put(self, texts: Texts, tokens: Array, step: Array) -> Texts:
        """Write the token of a step, (R,)."""
        slot, pad = self.start + step, self.task.module.config.pad_token_id
        return texts._replace(
            sequences=write(texts.sequences, tokens, slot, 1),
            positions=write(texts.positions, jnp.where(tokens == pad, pad, texts.next_position), slot, 1),
            next_position=texts.next_position + (tokens != pad).astype(jnp.int32),
        )

    def next(self, texts: Texts, step: Array) -> tuple[Texts, Array]:
        """The texts, and the logits behind the token of a step, (R, V)."""
        slot = self.start + step
        encoder = {name: None if value is None else self.rows(value) for name, value in self.encoder.items()}
        if self.plan.use_cache:
            ids, positions = (read(array, slot, 1)[:, None] for array in (texts.sequences, texts.positions))
            states, past = self.call(ids, None, self.real, positions, encoder, texts.past)
            return texts._replace(past=past), self.logits(states[:, -1])
        ids, embeds = texts.sequences, None
        if self.prompt.embeds is not None:
            table = self.model.roberta_prelayernorm.embeddings.word_embeddings
            new = table(texts.sequences[:, self.start :])
            ids, embeds = None, jnp.concatenate((self.rows(self.prompt.embeds).astype(new.dtype), new), axis=1)
        states, _ = self.call(ids, embeds, self.real, texts.positions, encoder, None)
        return texts, self.logits(read(states, slot, 1))

    def reorder(self, texts: Texts, rows: Array) -> Texts:
        """Let every row continue another one, before its token is put."""
        return texts._replace(
            positions=texts.positions[rows],
            next_position=texts.next_position[rows],
            past=None if texts.past is None else cache.reorder(texts.past, rows),
        )

    def call(
        self, ids: Array | None, embeds: Array | None, mask: Array, positions: Array, encoder: dict, past: Any
    ) -> tuple[Array, Any]:
        """Call the base model: its states, and its cache."""
        record = self.model.roberta_prelayernorm(
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
        return record.last_hidden_state, record.past_key_values

    def logits(self, states: Array) -> Array:
        """The logits behind some states, (R, D) -> (R, V)."""
        table = self.model.roberta_prelayernorm.embeddings.word_embeddings.embedding
        return policy.widened(self.model.lm_head(states, table))


class Draws:
    """Where the uniform numbers of sampling come from: drawn, or handed in. There are none without sampling."""

    def __init__(self, arguments: Arguments, decoder: Decoder) -> None:
        self.key, self.given, self.dtype = arguments.key, arguments.draws, decoder.dtype
        self.shape = drawn_shape(decoder.plan, decoder.batch)

    def at(self, step: Array) -> Array | None:
        """The draws of a step."""
        if self.given is not None:
            return read(self.given, step, 0).astype(self.dtype)
        if self.key is not None:
            return jax.random.uniform(jax.random.fold_in(self.key, step), self.shape, self.dtype)
        return None


def drawn_shape(plan: Plan, batch: int) -> tuple[int, ...]:
    """How many numbers each step draws."""
    return (batch, plan.num_beams * plan.vocab_size) if plan.num_beams > 1 else (batch * plan.rows,)


def chance(
    task: Task, lengths: Lengths, batch: int, seed: int | None, prng_key: Array | None, draws: Any
) -> tuple[Array | None, np.ndarray | None]:
    """The key to draw from, or the numbers that are handed in, with room for every step."""
    if not task.plan.do_sample:
        return None, None
    if draws is None:
        return jax.random.PRNGKey(seed or 0) if prng_key is None else prng_key, None
    draws = np.asarray(draws)
    generation.check_draws(draws, (lengths.most, *drawn_shape(task.plan, batch)))
    return None, np.pad(draws, ((0, task.room - lengths.most), *((0, 0),) * (draws.ndim - 1)))


# ------------------------------------------------------------- the loop


def begin(task: Task, arguments: Arguments) -> tuple[State, Array]:
    """The first step: the state behind it, and the scores of its tokens."""
    decoder, plan = Decoder(task, arguments), task.plan
    texts, logits = decoder.first()
    rows = len(texts.sequences)
    if plan.num_beams > 1:
        sequences = texts.sequences.reshape(-1, plan.num_beams, texts.sequences.shape[1])
        found = policy.start(plan, sequences, task.room, decoder.dtype)
    else:
        found = Rows(jnp.zeros(rows, bool), jnp.zeros((rows, task.room), decoder.dtype))
    room = (task.room, rows, plan.vocab_size)
    kept = Kept(
        *(jnp.zeros(room, decoder.dtype) if asked else None for asked in (plan.output_scores, plan.output_logits))
    )
    state = State(jnp.int32(0), texts, found, kept, jnp.bool_(True), jnp.int32(0))
    return take(decoder, Draws(arguments, decoder), state, logits)


def step(task: Task, arguments: Arguments, state: State) -> tuple[State, Array]:
    """A further step."""
    decoder = Decoder(task, arguments)
    texts, logits = decoder.next(state.texts, state.step - 1)
    return take(decoder, Draws(arguments, decoder), state._replace(texts=texts), logits)


def run(task: Task, arguments: Arguments) -> State:
    """All steps."""
    return jax.lax.while_loop(
        lambda state: state.going, lambda state: step(task, arguments, state)[0], begin(task, arguments)[0]
    )


PARTS = (begin, step, run)


class Program(NamedTuple):
    """The functions above for one task, compiled or not."""

    task: Task
    begin: Callable[[Arguments], tuple[State, Array]]
    step: Callable[[Arguments, State], tuple[State, Array]]
    run: Callable[[Arguments], State]


_PROGRAMS: WeakKeyDictionary[Generation, OrderedDict[tuple, Program]] = WeakKeyDictionary()
"""What each model has compiled; it goes with the model."""


def run_by_step(program: Program, arguments: Arguments, criteria: Sequence[Criterion], streamer: Any) -> State:
    """All steps, with a look at every token."""
    prompt, plan = arguments.prompt, program.task.plan
    start = prompt.real.shape[1]
    first = int(prompt.real.any(axis=0).argmax())  # before it are the columns that fill the bucket
    ids = np.full(prompt.real.shape, plan.pad) if prompt.ids is None else prompt.ids
    stream = generation.Stream(streamer, lambda: ids[:, first:].repeat(plan.rows, axis=0))
    state, scores = program.begin(arguments)
    while True:
        end = start + int(checked(state).step)
        stream.put(lambda: np.asarray(state.texts.sequences)[:, end - 1])  # noqa: B023  called at once
        if criteria:
            sequences = jnp.asarray(np.asarray(state.texts.sequences)[:, first:end])
            ended = state.found.ended
            for criterion in criteria:
                ended = ended | jnp.asarray(criterion(sequences, scores), bool)
            state = state._replace(found=state.found._replace(ended=ended), going=state.going & ~ended.all())
        if not state.going:
            break
        state, scores = program.step(arguments, state)
    stream.end()
    return state


def checked(state: State) -> State:
    """The state, if nothing went wrong.

    Raises:
        InputError: when scores were not numbers, or a row that had not ended could take no token.
    """
    if failed := int(state.failed):
        raise generation.failure(int(state.step), failed == NOT_A_NUMBER)
    return state


# ------------------------------------------------------------- one step


def take(decoder: Decoder, draws: Draws, state: State, logits: Array) -> tuple[State, Array]:
    """One step: the state behind it, and the scores of its tokens."""
    search = beam_search if decoder.plan.num_beams > 1 else token_by_token
    texts, found, scores, going, failed = search(decoder, draws, state, logits)
    kept = (
        None if buffer is None else write(buffer, values, state.step, 0)
        for buffer, values in zip(state.kept, (scores, logits), strict=True)
    )
    fine = failed == 0
    return State(state.step + fine.astype(jnp.int32), texts, found, Kept(*kept), going & fine, failed), scores


def token_by_token(
    decoder: Decoder, draws: Draws, state: State, logits: Array
) -> tuple[Texts, Rows, Array, Array, Array]:
    """Greedy search, or sampling: every row takes one token at each step."""
    plan, step, (ended, log_probs) = decoder.plan, state.step, state.found
    scores, failed = allowed(decoder, state.texts.sequences, logits, ended, step)
    tokens = jnp.where(ended, plan.pad, policy.choose(plan, scores, draws.at(step)))
    gained = policy.pick(jax.nn.log_softmax(scores, axis=-1), tokens[:, None])[:, 0]
    log_probs = write(log_probs, jnp.where(ended, 0.0, gained), step, 1)
    texts = decoder.put(state.texts, tokens, step)
    ended = ended | jnp.isin(tokens, np.array(plan.eos, np.int32))
    return texts, Rows(ended, log_probs), scores, (step + 1 < decoder.lengths.most) & ~ended.all(), failed


def beam_search(
    decoder: Decoder, draws: Draws, state: State, logits: Array
) -> tuple[Texts, Beams, Array, Array, Array]:
    """Beam search, or beam sampling."""
    plan, lengths, step, beams = decoder.plan, decoder.lengths, state.step, state.found
    dead = jnp.isinf(beams.scores).reshape(-1)
    scores = jax.nn.log_softmax(logits, axis=-1)
    scores, failed = allowed(decoder, state.texts.sequences, scores, dead, step)
    beams, rows, tokens = policy.advance(plan, lengths, beams, scores, draws.at(step), decoder.start + step, step)
    texts = decoder.reorder(state.texts, rows)._replace(sequences=beams.sequences.reshape(len(rows), -1))
    texts = decoder.put(texts, tokens, step)
    return texts, beams, scores, (step + 1 < lengths.most) & beams.going, failed


def allowed(decoder: Decoder, sequences: Array, scores: Array, ended: Array, step: Array) -> tuple[Array, Array]:
    """The scores of the tokens that may come, -inf for others; and why there may be none in a row that goes on."""
    plan, length = decoder.plan, decoder.start + step
    numbers = (~jnp.isnan(scores).any(axis=-1) | ended).all()
    scores = policy.process(plan, decoder.lengths, scores, sequences, decoder.real, length, step)
    filling = decoder.real.any(axis=0).argmax().astype(jnp.int32)  # columns in front that make the bucket full
    for processor in decoder.task.processors:
        scores = processor(jnp.roll(sequences, -filling, axis=1), scores, length - filling)
    scores = policy.warp(plan, scores)
    some = (~jnp.isneginf(scores).all(axis=-1) | ended).all()
    return scores, jnp.where(numbers, jnp.where(some, 0, NOTHING_ALLOWED), NOT_A_NUMBER).astype(jnp.int32)


def narrow(array: np.ndarray) -> np.ndarray:
    """Integers as they are computed with; other arrays as they are."""
    return array.astype(np.int32) if array.dtype.kind == "i" else array


def read(array: Array, index: Array, axis: int) -> Array:
    """One item of an axis."""
    return jax.lax.dynamic_index_in_dim(array, index, axis, keepdims=False)


def write(array: Array, values: Array, index: Array, axis: int) -> Array:
    """An array with another item of an axis."""
    return jax.lax.dynamic_update_index_in_dim(array, values, index, axis)


def finish(plan: Plan, prompt: Prompt, state: State) -> GenerateOutput:
    """The record, with the prompts as they were given in front of the new tokens."""
    steps, start, found = int(state.step), prompt.real.shape[1], state.found
    if plan.num_beams > 1:
        best = (found.ended_sequences, found.ended_scores, found.ended_log_probs, found.ended_origins)
        sequences, scores, log_probs, origins = (
            np.concatenate(np.asarray(array)[:, : plan.num_return_sequences]) for array in best
        )
        steps = int((origins >= 0).sum(axis=1).max())
        origins = jnp.asarray(origins[:, :steps])
    else:
        sequences, log_probs, origins = np.asarray(state.texts.sequences), np.asarray(found.log_probs), None
        scores = log_probs.sum(axis=1)
    shown = prompt.shown.repeat(plan.num_return_sequences, axis=0).astype(np.int32)
    kept = (None if buffer is None else tuple(islice(buffer, int(state.step))) for buffer in state.kept)
    return GenerateOutput(
        jnp.asarray(np.concatenate((shown, sequences[:, start : start + steps]), axis=1)),
        jnp.asarray(scores),
        jnp.asarray(log_probs[:, :steps]),
        *kept,
        origins,
    )
