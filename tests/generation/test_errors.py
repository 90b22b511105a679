"""What cannot be done is the same error with the same words in every backend."""

import re
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from roberta_pln import checkpoint
from roberta_pln.checks import InputError
from roberta_pln.config import ConfigError
from roberta_pln.generation import GenerationConfig
from roberta_pln.surgery import WORD_TABLE
from tests.contract import load
from tests.generation.common import (
    COMPILED,
    DECODERS,
    EOS,
    PROMPTS,
    STATES,
    VOCAB,
    decoder,
    decoder_config,
    generate,
    logits_of,
    talkative,
    without_padding,
)

INPUTS = PROMPTS["padding on every side"]
IDS = INPUTS["input_ids"]
ALL = list(range(VOCAB))


def nothing(*arguments):
    """Stands for a streamer, or a criterion."""


CALLS = {
    # what `plan` refuses
    "an unknown option": ({"max_tokens": 3}, "generate has no option max_tokens; it has max_length, max_new_tokens, "),
    "two unknown options": ({"b": 1, "a": 1}, "generate has no option a, b; it has "),
    "an option that is not there": (
        {"num_beam_groups": 2},
        "num_beam_groups=2 is not supported: leave it out. There",
    ),
    "one of a config": (
        {"generation_config": GenerationConfig.from_dict({"penalty_alpha": 0.6})},
        "penalty_alpha=0.6 is not supported: leave it out",
    ),
    "a value that breaks its rule": ({"num_beams": 0}, "num_beams must be an integer of at least 1, got 0"),
    "a text for a number": ({"top_p": "0.9"}, "top_p must be a number above 0 and at most 1, got '0.9'"),
    "no room": (
        {"max_length": 8},
        r"max_length \(8\) counts the prompt, whose 8 tokens leave no room: set max_new",
    ),
    "two lengths": (
        {"max_length": 20, "max_new_tokens": 3},
        "max_length=20 counts the prompt and max_new_tokens=3 does not: give one of them",
    ),
    "a least length above the greatest": (
        {"max_new_tokens": 3, "min_new_tokens": 4},
        r"min_length \(0\) and min_new_tokens \(4\) ask for 4 new tokens at least, and there are 3 at most",
    ),
    "a temperature without sampling": (
        {"temperature": 0.5, "top_k": 3},
        "temperature, top_k has an effect with do_sample=True only: set that, or leave it out",
    ),
    "a length penalty without beams": (
        {"length_penalty": 0.5},
        "length_penalty has an effect with num_beams above 1 only: set that, or leave it out",
    ),
    "more sequences than beams": (
        {"num_beams": 2, "num_return_sequences": 3},
        r"num_return_sequences \(3\) must be at most num_beams \(2\) without sampling: there are no more different",
    ),
    "more sequences than one": (
        {"num_return_sequences": 2},
        r"num_return_sequences \(2\) must be at most num_beams \(1\) without sampling",
    ),
    "a suppressed token that is none": (
        {"suppress_tokens": [VOCAB]},
        r"suppress_tokens must be at least 0 and below vocab_size \(40\), got 40",
    ),
    "a bad word that is none": (
        {"bad_words_ids": [[3, 41]]},
        r"bad_words_ids must be at least 0 and below vocab_size \(40\), got 41",
    ),
    "an end that is no token": (
        {"eos_token_id": [2, 40]},
        r"eos_token_id must be at least 0 and below vocab_size \(40\), got 40",
    ),
    "padding that is no token": (
        {"pad_token_id": 40},
        r"pad_token_id must be at least 0 and below vocab_size \(40\), got 40",
    ),
    "no token is left": ({"suppress_tokens": ALL}, "suppress_tokens and bad_words_ids forbid all 40 tokens"),
    "no first token is left": (
        {"suppress_tokens": ALL[:20], "begin_suppress_tokens": ALL[20:]},
        "suppress_tokens, bad_words_ids and begin_suppress_tokens forbid all 40 tokens of the vocabulary: leave some",
    ),
    # what `arrange` refuses
    "ids and embeddings": (
        {"inputs_embeds": np.zeros((3, 8, 32))},
        "You cannot specify both input_ids and inputs_embeds at the same time",
    ),
    "two names of the prompts": (
        {"inputs": IDS},
        "inputs and input_ids are two names of the prompts: give one of them",
    ),
    "embeddings of another width": (
        {"input_ids": None, "inputs_embeds": np.zeros((3, 8, 31))},
        r"inputs_embeds must have shape \(B, T, 32\), got \(3, 8, 31\)",
    ),
    "ids of one axis": ({"input_ids": IDS[0]}, r"input_ids must be integers of shape \(B, T\), got int64 \(8,\)"),
    "ids that are no integers": (
        {"input_ids": IDS + 0.5},
        r"input_ids must be integers of shape \(B, T\), got float64 \(3, 8\)",
    ),
    "an id above the vocabulary": (
        {"input_ids": np.where(IDS == 23, 40, IDS)},
        r"input_ids must be at least 0 and below vocab_size \(40\), got 40",
    ),
    "an id below 0": ({"input_ids": IDS - 2}, r"input_ids must be at least 0 and below vocab_size \(40\), got -1"),
    "a mask of another shape": (
        {"attention_mask": np.ones((3, 7), int)},
        r"attention_mask must have shape \(3, 8\), got \(3, 7\)",
    ),
    "a mask of three axes": (
        {"attention_mask": np.ones((3, 8, 8), int)},
        r"attention_mask must have shape \(3, 8\), got \(3, 8, 8\)",
    ),
    "a prompt of padding": (
        {"attention_mask": INPUTS["attention_mask"] * np.array([[1], [0], [1]])},
        "every prompt needs a token to continue; row 1 is padding only: start it with the bos token",
    ),
    "a continuation that leaves the table": (
        {"max_new_tokens": 73},
        "prompt and continuation must have at most 78 tokens together: the prompt has 6, which leaves room for 72 new "
        "ones, and 73 are asked for. Lower max_new_tokens",
    ),
    # what `check_extras` refuses
    "a streamer of beams": (
        {"num_beams": 2, "streamer": nothing},
        "streamer sees texts that grow at their end only, which a beam search does not: leave it out",
    ),
    "criteria of beams": (
        {"num_beams": 2, "stopping_criteria": [nothing]},
        "stopping_criteria sees texts that grow at their end only",
    ),
    "a seed without sampling": (
        {"seed": 1},
        "seed has an effect with do_sample=True only: set that, or leave it out",
    ),
    "two sources of chance": (
        {"seed": 1, "draws": np.zeros((4, 3)), "do_sample": True},
        "seed and draws are two sources of chance: give one of them",
    ),
    # what `check_draws` refuses
    "draws of another shape": (
        {"draws": np.zeros((4, 2)), "do_sample": True, "max_new_tokens": 4},
        r"draws must have shape \(4, 3\), got \(4, 2\)",
    ),
    "draws for beams of another shape": (
        {"draws": np.zeros((4, 3)), "do_sample": True, "max_new_tokens": 4, "num_beams": 2},
        r"draws must have shape \(4, 3, 80\), got \(4, 3\)",
    ),
    "a draw of 1": (
        {"draws": np.ones((4, 3)), "do_sample": True, "max_new_tokens": 4},
        "draws must be at least 0 and below 1",
    ),
    "encoder states for a decoder without cross-attention": (STATES, ".*has to be instantiated with cross-attention"),
}

FAILURES = {
    "every token is forbidden": (
        {"suppress_tokens": [token for token in ALL if token != 20], "bad_words_ids": [[27, 20]]},
        r"no token is allowed as new token 0: the processors \(suppress_tokens, bad_words_ids, no_repeat_ngram_size, ",
    ),
    "every second token is forbidden": (
        {"no_repeat_ngram_size": 1, "suppress_tokens": [token for token in ALL if token != 20]},
        "no token is allowed as new token 1: the processors",
    ),
    "an embedding that is no number": (
        {"max_new_tokens": 4},
        "the logits of new token 1 are not numbers: the weights or the inputs are not finite",
    ),
}
"""What goes wrong on the way; the embedding is that of the token that comes first."""

MODES = {"greedy": {}, "drawn": {"do_sample": True, "seed": 0, "top_k": 1}, "beams": {"num_beams": 3}}


@pytest.mark.parametrize("name", CALLS)
def test_calls(backend, name):
    options, message = CALLS[name]
    with pytest.raises((InputError, ConfigError)) as refused:
        decoder(backend).generate(**{**INPUTS, **options})
    assert re.match(message, str(refused.value)), str(refused.value)  # no framework adds its own


def test_encoder_states_of_another_batch(backend):
    states = {name: value[:2] for name, value in STATES.items()}
    with pytest.raises(InputError, match=r"encoder_hidden_states must have shape \(3, any, 32\), got \(2, 5, 32\)"):
        generate(decoder(backend, "with an encoder"), {**INPUTS, **states}, max_new_tokens=2)


@cache
def spoilt(backend: str):
    """A model with an embedding that is no number, of the first token that it gives."""
    found = generate(decoder(backend, "untied"), INPUTS, max_new_tokens=1)
    first = next(token for token in found["sequences"][:, -1] if token != EOS and token not in IDS)
    config = decoder_config(**DECODERS["untied"])
    tensors = talkative(config)
    tensors[WORD_TABLE][first] = np.nan
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(tensors, folder, config, "ForCausalLM")
        return load(backend, Path(folder), "ForCausalLM")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FAILURES)
def test_failures(backend, name, mode):
    options, message = FAILURES[name]
    model = spoilt(backend) if "embedding" in name else decoder(backend)
    with pytest.raises(InputError, match=message):
        generate(model, INPUTS, **options, **MODES[mode])
    if mode == "greedy" and name != "every token is forbidden":
        for how in COMPILED[backend].values():
            with pytest.raises(InputError, match=message):
                generate(model, INPUTS, **options, **how)
        with pytest.raises(InputError, match=message):
            generate(model, INPUTS, **options, streamer=print)
    assert generate(model, INPUTS, max_new_tokens=1)["sequences"].shape == (3, 9)  # it may go on


def test_beams_that_are_not_there_need_no_token(backend):
    """Of three beams only two can begin; the third stands for nothing, so that nothing may follow is no failure."""
    options = {"suppress_tokens": [token for token in ALL if token not in (7, 20)], "num_beams": 3}
    words = [[first, token] for first in ALL if first not in (7, 20) for token in (7, 20)][:8]
    found = generate(decoder(backend), INPUTS, max_new_tokens=2, bad_words_ids=words, **options)
    assert np.isin(found["sequences"][:, 8:], (7, 20)).all()


def test_an_encoder_does_not_generate(backend):
    model = decoder(backend)
    model.config.is_decoder = False
    try:
        with pytest.raises(InputError, match="generate continues texts with a decoder: set is_decoder=True in"):
            model.generate(**INPUTS)
    finally:
        model.config.is_decoder = True


def test_a_full_table_is_no_error(backend):
    """The greatest length that is allowed: every row of the position table is used, and every distance."""
    for name, tokens in (("plain", 38 - 6), ("relative_key", 40 - 6)):
        config = decoder_config(**DECODERS[name], max_position_embeddings=40, num_hidden_layers=1)
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save(talkative(config, ending=-30.0), folder, config, "ForCausalLM")
            model = load(backend, Path(folder), "ForCausalLM")
        how = next(iter(COMPILED[backend].values()))
        found = generate(model, INPUTS, max_new_tokens=tokens, output_logits=True, **how)
        whole = logits_of(model, [np.append(without_padding(INPUTS)[2], found["sequences"][2, 8:-1])], tokens + 5)
        np.testing.assert_allclose(found["logits"][:, 2], whole[0, 5:], rtol=0, atol=1e-12)  # as in `test_forward`
        with pytest.raises(InputError, match="prompt and continuation must have at most"):
            generate(model, INPUTS, max_new_tokens=tokens + 1)
