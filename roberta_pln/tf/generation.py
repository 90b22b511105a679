"""Generation: the loop that feeds a decoder its own tokens, compiled as one function."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from roberta_pln import generation
from roberta_pln.checks import InputError
from roberta_pln.generation import GenerationConfig, Lengths, Plan, Prompt
from roberta_pln.outputs import GenerateOutput
from roberta_pln.tf import cache, policy
from roberta_pln.tf.layers import next_seed
from roberta_pln.tf.policy import Beams

Processor = Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]
"""Token ids (R, L), scores (R, V) and how many slots of the ids are taken to scores (R, V), as in transformers."""
Criterion = Callable[[tf.Tensor, tf.Tensor], tf.Tensor | bool]
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
        inputs: tf.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Sequence[Processor] | None = None,
        stopping_criteria: Sequence[Criterion] | None = None,
        streamer: Any = None,
        *,
        input_ids: tf.Tensor | None = None,
        attention_mask: tf.Tensor | None = None,
        inputs_embeds: tf.Tensor | None = None,
        encoder_hidden_states: tf.Tensor | None = None,
        encoder_attention_mask: tf.Tensor | None = None,
        seed: int | None = None,
        draws: Any = None,
        compiled: bool = True,
        jit_compile: bool = False,
        **options: Any,
    ) -> tf.Tensor | GenerateOutput:
        """Continue prompts.

        The positions are those of the call, whatever the padding: every greedy token is the most likely one by a
        call on the tokens so far. Dropout is off.

        The loop is compiled at its first call, and again for another plan (whatever of the options is no length), other
        processors, batch, or lengths in another multiple of `BUCKET`; weights that change are read anew.

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
            encoder_hidden_states, encoder_attention_mask: those of the call, for every step.
            seed: what is drawn from, for sampling; the model's own generator if not given.
            draws: uniform numbers in [0, 1) used instead of drawn ones: (N, R) for N new tokens of R rows, or
                (N, B, beams * V) in a beam search.
            compiled: `False` runs the steps one by one as they are written, to look into them.
            jit_compile: whether XLA compiles; the tokens are the same. On a CPU they take longer then: TensorFlow's own
                products of few rows with a matrix are faster.
            options: fields of `GenerationConfig`, which win over it.

        Returns:
            (R, T + new tokens) token ids; `num_return_sequences` rows for each prompt. With
            `return_dict_in_generate=True` a `GenerateOutput`.

        Raises:
            InputError: when the model is no decoder, the options contradict each other or are not supported, the
                text would leave the position table, no token is allowed, or logits are not numbers.
            ConfigError: when an option's value breaks its rule.
        """
        if not tf.executing_eagerly():
            raise InputError(
                "generate looks at its arguments before it compiles its loop: call it outside of tf.function"
            )
        if inputs is not None and input_ids is not None:
            raise InputError("inputs and input_ids are two names of the prompts: give one of them")
        ids, embeds, mask = (
            self.array(value) for value in (inputs if inputs is not None else input_ids, inputs_embeds, attention_mask)
        )
        columns = next((array.shape[1] for array in (ids, embeds) if array is not None and array.ndim > 1), 0)
        request = generation.plan(self.config, self.generation_config, generation_config, options, columns)
        plan = request.plan
        generation.check_extras(plan, stopping_criteria, streamer, seed, None, draws)
        batch = 1 if encoder_hidden_states is None else len(encoder_hidden_states)
        prompt, room = generation.arrange_in_buckets(self.config, request, ids, embeds, mask, batch, BUCKET)
        task = Task(self, plan, tuple(logits_processor or ()), room, compiled and jit_compile)
        with tf.init_scope():  # no tape records the loop
            arguments = Arguments(
                tf.nest.map_structure(self.constant, prompt._replace(shown=None)),
                Lengths(*map(tf.constant, request.lengths)),
                self.constant(encoder_hidden_states),
                self.constant(encoder_attention_mask),
                *chance(task, request.lengths, len(prompt.real), seed, draws),
            )
            program = self.program(task) if compiled else Program(task, *(partial(part, task) for part in PARTS))
            criteria = stopping_criteria or ()
            if compiled and not criteria and streamer is None:
                state = program.run(arguments)
            else:
                state = run_by_step(program, arguments, criteria, streamer)
            record = finish(plan, prompt, checked(state))
        return record if request.as_record else record.sequences

    def array(self, value: Any) -> np.ndarray | None:
        """An argument of `generate` in NumPy."""
        return None if value is None else np.asarray(value)

    def constant(self, value: Any) -> tf.Tensor | None:
        """An argument of the loop as a tensor, states in the type that the model computes in."""
        if value is None:
            return None
        tensor = tf.convert_to_tensor(value)
        return tf.cast(tensor, self.compute_dtype) if tensor.dtype.is_floating else tensor

    def program(self, task: "Task") -> "Program":
        """The compiled code of a task. A changed config has code of its own; a changed shape makes all code old."""
        programs = self.programs.kept
        key = (repr(self.config), task.plan, task.room, task.xla, *map(id, task.processors))
        if key not in programs:
            functions = (tf.function(partial(part, task), autograph=False, jit_compile=task.xla) for part in PARTS)
            programs[key] = Program(task, *functions)
        programs.move_to_end(key)
        if len(programs) > PROGRAMS:
            programs.popitem(last=False)
        return programs[key]


class Programs:
    """What a model has compiled, which goes with it. Keras looks into dictionaries for what to save, not into this."""

    def __init__(self) -> None:
        self.kept: OrderedDict[tuple[Any, ...], Program] = OrderedDict()


class Task(NamedTuple):
    """What compiled code depends on, beside the shapes of its arguments."""

    model: Any
    plan: Plan
    processors: tuple[Processor, ...]
    room: int  # N, slots for new tokens
    xla: bool  # whether XLA compiles


class Arguments(NamedTuple):
    """What compiled code is called with."""

    prompt: Prompt
    lengths: Lengths
    encoder_hidden_states: tf.Tensor | None
    encoder_attention_mask: tf.Tensor | None
    seed: tf.Tensor | None  # (2,) int64, what is drawn from, for sampling
    draws: tf.Tensor | None  # what is used instead of drawn numbers


class Texts(NamedTuple):
    """The texts that are continued, and the model's cache of them."""

    sequences: tf.Tensor  # (R, L) token ids in slots, pad tokens where there is none yet
    positions: tf.Tensor  # (R, L)
    next_position: tf.Tensor  # (R,) of the next token
    past: tuple[tuple[tf.Tensor, ...], ...]  # of every layer the tensors; none without a cache


class Rows(NamedTuple):
    """What is known of rows that take one token at each step."""

    ended: tf.Tensor  # (R,) bool
    log_probs: tf.Tensor  # (R, N) of each new token, 0 behind the end


class Kept(NamedTuple):
    """What is returned of every step; empty where it is not asked for."""

    scores: tf.Tensor | tuple[()]  # (N, R, V)
    logits: tf.Tensor | tuple[()]  # (N, R, V)


class State(NamedTuple):
    """A generation between two steps."""

    step: tf.Tensor  # () int32, new tokens that are there
    texts: Texts
    found: Rows | Beams
    kept: Kept
    going: tf.Tensor  # () bool
    failed: tf.Tensor  # () int32


class Decoder:
    """A model with the texts that it continues.

    Attributes:
        real: (R, L) bool, the slots that hold a token to attend to; all those of new tokens are.
        start: the slot of the first new token.
    """

    def __init__(self, task: Task, arguments: Arguments) -> None:
        self.task, self.plan, self.lengths, self.prompt = task, task.plan, arguments.lengths, arguments.prompt
        self.model = task.model
        self.batch, self.start = self.prompt.real.shape
        self.dtype = policy.softmax_dtype(tf.as_dtype(self.model.compute_dtype))
        self.real = self.slots(self.prompt.real, True)
        self.encoder = {
            "encoder_hidden_states": arguments.encoder_hidden_states,
            "encoder_attention_mask": arguments.encoder_attention_mask,
        }

    def rows(self, array: tf.Tensor) -> tf.Tensor:
        """What the rows of the prompts have for the rows that continue them, (B, ...) -> (R, ...)."""
        count = self.plan.rows
        return array if count == 1 else tf.gather(array, np.arange(self.batch).repeat(count))

    def slots(self, array: tf.Tensor, value: int | bool) -> tf.Tensor:
        """What the prompts have in their slots, (B, S), with a value in the slots of new tokens, (R, L)."""
        return self.rows(tf.pad(array, ((0, 0), (0, self.task.room)), constant_values=value))

    def first(self) -> tuple[Texts, tf.Tensor]:
        """The texts, and the logits of the first new token, (R, V), from a call on the prompts."""
        prompt, pad = self.prompt, self.model.config.pad_token_id
        states, past = self.call(prompt.ids, prompt.embeds, prompt.real, prompt.positions, self.encoder, None)
        ids = tf.fill(prompt.real.shape, tf.constant(self.plan.pad, tf.int64)) if prompt.ids is None else prompt.ids
        texts = Texts(
            self.slots(ids, self.plan.pad),
            self.slots(prompt.positions, pad),
            self.rows(prompt.next_position),
            cache.with_room(past, self.task.room, self.rows) if self.plan.use_cache else (),
        )
        return texts, self.rows(self.logits(states[:, -1]))

    def put(self, texts: Texts, tokens: tf.Tensor, step: tf.Tensor) -> Texts:
        """Write the token of a step, (R,)."""
        slot, pad = self.start + step, tf.constant(self.model.config.pad_token_id, tf.int64)
        return texts._replace(
            sequences=write(texts.sequences, tokens, slot),
            positions=write(texts.positions, tf.where(tokens == pad, pad, texts.next_position), slot),
            next_position=texts.next_position + tf.cast(tokens != pad, tf.int64),
        )

    def next(self, texts: Texts, step: tf.Tensor) -> tuple[Texts, tf.Tensor]:
        """The texts, and the logits behind the token of a step, (R, V)."""
        slot = self.start + step
        encoder = {name: None if value is None else self.rows(value) for name, value in self.encoder.items()}
        if self.plan.use_cache:
            ids, positions = (tf.gather(array, [slot], axis=1) for array in (texts.sequences, texts.positions))
            seen = self.real & (tf.range(self.real.shape[1]) <= slot)
            past = cache.slots(texts.past, slot, self.task.xla)
            states, past = self.call(ids, None, seen[:, None], positions, encoder, past)
            return texts._replace(past=cache.tensors(past)), self.logits(states[:, -1])
        ids, embeds = texts.sequences, None
        if self.prompt.embeds is not None:
            table = self.model.get_input_embeddings()
            new = table(texts.sequences[:, self.start :])
            ids, embeds = None, tf.concat((self.rows(self.prompt.embeds), new), axis=1)
        states, _ = self.call(ids, embeds, self.real, texts.positions, encoder, None)
        return texts, self.logits(tf.gather(states, slot, axis=1))

    def reorder(self, texts: Texts, rows: tf.Tensor) -> Texts:
        """Let every row continue another one, before its token is put."""
        return texts._replace(
            positions=tf.gather(texts.positions, rows),
            next_position=tf.gather(texts.next_position, rows),
            past=cache.reorder(texts.past, rows),
        )

    def call(
        self,
        ids: tf.Tensor | None,
        embeds: tf.Tensor | None,
        mask: tf.Tensor,
        positions: tf.Tensor,
        encoder: dict[str, tf.Tensor | None],
        past: Any,
    ) -> tuple[tf.Tensor, Any]:
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
            training=False,
            **encoder,
        )
        return record.last_hidden_state, record.past_key_values

    def logits(self, states: tf.Tensor) -> tf.Tensor:
        """The logits behind some states, (R, D) -> (R, V)."""
        table = self.model.get_input_embeddings().embeddings.value
        return policy.widened(self.model.lm_head(states, table))


class Draws:
    """Where the uniform numbers of sampling come from: drawn, or handed in. There are none without sampling."""

    def __init__(self, arguments: Arguments, decoder: Decoder) -> None:
        self.seed, self.given, self.dtype = arguments.seed, arguments.draws, decoder.dtype
        self.shape = drawn_shape(decoder.plan, decoder.batch)

    def at(self, step: tf.Tensor) -> tf.Tensor | None:
        """The draws of a step."""
        if self.given is not None:
            return tf.cast(self.given[step], self.dtype)
        if self.seed is None:
            return None
        # By default each device, and XLA, has another algorithm; and XLA turns the same bits into other numbers.
        seed = tf.random.experimental.stateless_fold_in(self.seed, step, alg="philox")
        bits = tf.random.stateless_uniform(self.shape, seed, None, None, tf.uint64, alg="philox")
        digits = np.finfo(self.dtype.as_numpy_dtype).nmant + 1
        return tf.cast(tf.bitwise.right_shift(bits, np.uint64(64 - digits)), self.dtype) * 2.0**-digits


def drawn_shape(plan: Plan, batch: int) -> tuple[int, ...]:
    """How many numbers each step draws."""
    return (batch, plan.num_beams * plan.vocab_size) if plan.num_beams > 1 else (batch * plan.rows,)


def chance(
    task: Task, lengths: Lengths, batch: int, seed: int | None, draws: Any
) -> tuple[tf.Tensor | None, tf.Tensor | None]:
    """The seed to draw from, or the numbers that are handed in, with room for every step."""
    if not task.plan.do_sample:
        return None, None
    if draws is None:
        return tf.cast(next_seed(task.model.seed_generator) if seed is None else (seed, 0), tf.int64), None
    draws = np.asarray(draws)
    generation.check_draws(draws, (lengths.most, *drawn_shape(task.plan, batch)))
    return None, tf.constant(np.pad(draws, ((0, task.room - lengths.most), *((0, 0),) * (draws.ndim - 1))))


# ------------------------------------------------------------- the loop


def begin(task: Task, arguments: Arguments) -> tuple[State, tf.Tensor]:
    """The first step: the state behind it, and the scores of its tokens."""
    decoder, plan = Decoder(task, arguments), task.plan
    texts, logits = decoder.first()
    rows, slots = texts.sequences.shape
    if plan.num_beams > 1:
        sequences = tf.reshape(texts.sequences, (-1, plan.num_beams, slots))
        found = policy.start(plan, sequences, task.room, decoder.dtype)
    else:
        found = Rows(tf.zeros(rows, tf.bool), tf.zeros((rows, task.room), decoder.dtype))
    room = (task.room, rows, plan.vocab_size)
    kept = Kept(*(tf.zeros(room, decoder.dtype) if asked else () for asked in (plan.output_scores, plan.output_logits)))
    state = State(tf.constant(0), texts, found, kept, tf.constant(True), tf.constant(0))
    return take(decoder, Draws(arguments, decoder), state, logits)


def step(task: Task, arguments: Arguments, state: State) -> tuple[State, tf.Tensor]:
    """A further step."""
    decoder = Decoder(task, arguments)
    texts, logits = decoder.next(state.texts, state.step - 1)
    return take(decoder, Draws(arguments, decoder), state._replace(texts=texts), logits)


def run(task: Task, arguments: Arguments) -> State:
    """All steps."""
    (state,) = tf.while_loop(
        lambda state: state.going,
        lambda state: [step(task, arguments, state)[0]],
        [begin(task, arguments)[0]],
        parallel_iterations=1,
    )
    return state


PARTS = (begin, step, run)


class Program(NamedTuple):
    """The functions above for one task, compiled or not."""

    task: Task
    begin: Callable[[Arguments], tuple[State, tf.Tensor]]
    step: Callable[[Arguments, State], tuple[State, tf.Tensor]]
    run: Callable[[Arguments], State]


def run_by_step(program: Program, arguments: Arguments, criteria: Sequence[Criterion], streamer: Any) -> State:
    """All steps, with a look at every token."""
    prompt, plan = arguments.prompt, program.task.plan
    start = prompt.real.shape[1]
    first = int(prompt.real.numpy().any(axis=0).argmax())  # before it are the columns that fill the bucket
    ids = np.full(prompt.real.shape, plan.pad) if prompt.ids is None else prompt.ids.numpy()
    stream = generation.Stream(streamer, lambda: ids[:, first:].repeat(plan.rows, axis=0))
    state, scores = program.begin(arguments)
    while True:
        end = start + int(checked(state).step)
        stream.put(lambda: state.texts.sequences.numpy()[:, end - 1])  # noqa: B023  called at once
        if criteria:
            ended = state.found.ended
            for criterion in criteria:
                ended = ended | tf.cast(criterion(state.texts.sequences[:, first:end], scores), tf.bool)
            going = state.going & ~tf.reduce_all(ended)
            state = state._replace(found=state.found._replace(ended=ended), going=going)
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


def take(decoder: Decoder, draws: Draws, state: State, logits: tf.Tensor) -> tuple[State, tf.Tensor]:
    """One step: the state behind it, and the scores of its tokens."""
    search = beam_search if decoder.plan.num_beams > 1 else token_by_token
    texts, found, scores, going, failed = search(decoder, draws, state, logits)
    kept = (
        buffer if isinstance(buffer, tuple) else cache.put(buffer, [[state.step]], values[None], decoder.task.xla)
        for buffer, values in zip(state.kept, (scores, logits), strict=True)
    )
    fine = failed == 0
    return State(state.step + tf.cast(fine, tf.int32), texts, found, Kept(*kept), going & fine, failed), scores


def token_by_token(
    decoder: Decoder, draws: Draws, state: State, logits: tf.Tensor
) -> tuple[Texts, Rows, tf.Tensor, tf.Tensor, tf.Tensor]:
    """Greedy search, or sampling: every row takes one token at each step."""
    plan, step, (ended, log_probs) = decoder.plan, state.step, state.found
    scores, failed = allowed(decoder, state.texts.sequences, logits, ended, step)
    tokens = tf.where(ended, tf.constant(plan.pad, tf.int64), policy.choose(plan, scores, draws.at(step)))
    gained = policy.pick(tf.nn.log_softmax(scores), tokens[:, None])[:, 0]
    log_probs = write(log_probs, tf.where(ended, tf.zeros((), decoder.dtype), gained), step)
    texts = decoder.put(state.texts, tokens, step)
    ended = ended | tf.gather(policy.among(scores, plan.eos), tokens)
    going = (step + 1 < decoder.lengths.most) & ~tf.reduce_all(ended)
    return texts, Rows(ended, log_probs), scores, going, failed


def beam_search(
    decoder: Decoder, draws: Draws, state: State, logits: tf.Tensor
) -> tuple[Texts, Beams, tf.Tensor, tf.Tensor, tf.Tensor]:
    """Beam search, or beam sampling."""
    plan, lengths, step, beams = decoder.plan, decoder.lengths, state.step, state.found
    dead = tf.reshape(tf.math.is_inf(beams.scores), [-1])
    scores = tf.nn.log_softmax(logits)
    scores, failed = allowed(decoder, state.texts.sequences, scores, dead, step)
    beams, rows, tokens = policy.advance(plan, lengths, beams, scores, draws.at(step), decoder.start + step, step)
    sequences = tf.reshape(beams.sequences, state.texts.sequences.shape)
    texts = decoder.put(decoder.reorder(state.texts, rows)._replace(sequences=sequences), tokens, step)
    return texts, beams, scores, (step + 1 < lengths.most) & beams.going, failed


def allowed(
    decoder: Decoder, sequences: tf.Tensor, scores: tf.Tensor, ended: tf.Tensor, step: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """The scores of the tokens that may come, -inf for others; and why there may be none in a row that goes on."""
    plan, length = decoder.plan, decoder.start + step
    numbers = tf.reduce_all(~tf.reduce_any(tf.math.is_nan(scores), axis=-1) | ended)
    scores = policy.process(plan, decoder.lengths, scores, sequences, decoder.real, length, step)
    for processor in decoder.task.processors:
        scores = processor(sequences, scores, length)
    scores = policy.warp(plan, scores)
    some = tf.reduce_all(tf.reduce_any(scores != -np.inf, axis=-1) | ended)
    return scores, tf.where(numbers, tf.where(some, 0, NOTHING_ALLOWED), NOT_A_NUMBER)


def write(array: tf.Tensor, values: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
    """A small array (R, ...) with another item of axis 1."""
    return tf.where(tf.range(array.shape[1]) == index, values[:, None], array)


def finish(plan: Plan, prompt: Prompt, state: State) -> GenerateOutput:
    """The record, with the prompts as they were given in front of the new tokens."""
    steps, start, found = int(state.step), prompt.real.shape[1], state.found
    if plan.num_beams > 1:
        best = (found.ended_sequences, found.ended_scores, found.ended_log_probs, found.ended_origins)
        sequences, scores, log_probs, origins = (
            np.concatenate(array.numpy()[:, : plan.num_return_sequences]) for array in best
        )
        steps = int((origins >= 0).sum(axis=1).max())
        origins = tf.constant(origins[:, :steps])
    else:
        sequences, log_probs, origins = state.texts.sequences.numpy(), found.log_probs.numpy(), None
        scores = log_probs.sum(axis=1)
    shown = prompt.shown.repeat(plan.num_return_sequences, axis=0)
    kept = (None if isinstance(buffer, tuple) else tuple(tf.unstack(buffer[: state.step])) for buffer in state.kept)
    return GenerateOutput(
        tf.constant(np.concatenate((shown, sequences[:, start : start + steps]), axis=1)),
        tf.constant(scores),
        tf.constant(log_probs[:, :steps]),
        *kept,
        origins,
    )
