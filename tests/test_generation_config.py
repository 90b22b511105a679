"""What a generation does is settled before it starts, without any framework: the config, the plan, the prompts."""

import dataclasses
import json
import re

import numpy as np
import pytest

from roberta_pln.checks import InputError
from roberta_pln.config import ConfigError, RobertaPreLayerNormConfig
from roberta_pln.generation import (
    GENERATION_CONFIG_FILE,
    GenerationConfig,
    Lengths,
    Request,
    Stream,
    arrange,
    check_draws,
    check_extras,
    failure,
    plan,
)

CONFIG = RobertaPreLayerNormConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    max_position_embeddings=24,
    is_decoder=True,
)


def request(tokens: int = 4, config=CONFIG, defaults=None, given=None, **options) -> Request:
    return plan(config, defaults, given, options, tokens)


# ------------------------------------------------------------- the file

WRITTEN = {
    "nothing": ({}, {}),
    "defaults": ({"max_length": 20, "do_sample": False, "top_k": 50}, {}),
    "own": ({"num_beams": 4, "early_stopping": "never"}, {"num_beams": 4, "early_stopping": "never"}),
    "unknown keys": ({"transformers_version": "4.57.6", "x": [1]}, {"transformers_version": "4.57.6", "x": [1]}),
    "None where there is a default": ({"top_k": None, "temperature": None}, {"top_k": None, "temperature": None}),
    "lists": (
        {"eos_token_id": [2, 5], "bad_words_ids": [[3], [4, 5]]},
        {"eos_token_id": [2, 5], "bad_words_ids": [[3], [4, 5]]},
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_file_and_back(name, tmp_path):
    """What is the default is not written; everything else comes back."""
    values, written = WRITTEN[name]
    config = GenerationConfig.from_dict(values)
    config.save_pretrained(tmp_path / "new")
    text = (tmp_path / "new" / GENERATION_CONFIG_FILE).read_text()
    assert json.loads(text) == written
    assert text == json.dumps(written, indent=2, sort_keys=True) + "\n"
    assert GenerationConfig.from_pretrained(tmp_path / "new") == config
    assert GenerationConfig.from_pretrained(tmp_path / "new" / GENERATION_CONFIG_FILE, num_beams=7).num_beams == 7


def test_files_that_are_not_there_or_no_config(tmp_path):
    with pytest.raises(FileNotFoundError):
        GenerationConfig.from_pretrained(tmp_path)
    for text, message in (
        ("{", "is not valid JSON"),
        ("3", "must hold a JSON object, got int"),
        ('{"top_p": 2}', "top_p must be a number above 0 and at most 1, got 2"),
    ):
        (tmp_path / GENERATION_CONFIG_FILE).write_text(text)
        with pytest.raises(ConfigError, match=f"{GENERATION_CONFIG_FILE}.*{message}"):
            GenerationConfig.from_pretrained(tmp_path)


def test_settings_in_old_model_configs():
    """Files older than `generation_config.json` keep them beside the sizes of the model."""
    config = CONFIG.replace(extra={"max_length": 30, "num_beams": 2, "task_specific_params": None})
    assert GenerationConfig.from_model_config(config) == GenerationConfig(max_length=30, num_beams=2)


# ------------------------------------------------------------- the rules of single values

WRONG = {
    "max_length": (0, 1.5, True, None, "20"),
    "max_new_tokens": (0, -1, 2.0),
    "min_length": (-1, 0.5),
    "min_new_tokens": (-1,),
    "do_sample": (1, None, "yes"),
    "num_beams": (0, None, 2.0),
    "early_stopping": ("always", 1, None),
    "length_penalty": ("1", None, float("nan"), float("inf")),
    "num_return_sequences": (0,),
    "use_cache": (0, None),
    "temperature": (0, -1.0, float("inf"), "hot", True),
    "top_k": (-1, 2.5),
    "top_p": (0, 1.1, -0.1),
    "min_p": (-0.1, 1.1),
    "typical_p": (0.0, 2),
    "repetition_penalty": (0, -1),
    "no_repeat_ngram_size": (-1, 1.5),
    "bad_words_ids": ([3], [[]], [[-1]], 3, [["a"]]),
    "forced_bos_token_id": (-1, [1]),
    "forced_eos_token_id": (-1, [], "2"),
    "suppress_tokens": (3, [-1], [0.5]),
    "begin_suppress_tokens": (3,),
    "pad_token_id": (-1, [1]),
    "bos_token_id": (-1, True),
    "eos_token_id": (-1, [], [2, -1], 0.5),
    "output_scores": (1,),
    "output_logits": ("no",),
    "return_dict_in_generate": (None,),
}
RIGHT = {
    "early_stopping": (True, False, "never"),
    "length_penalty": (0, -2.5),
    "temperature": (np.float32(0.5), 3, None),
    "top_k": (0, None, np.int64(3)),
    "top_p": (1, 0.1, None),
    "min_p": (0, 1, None),
    "eos_token_id": (0, [2], (2, 3), None),
    "bad_words_ids": ([], [[1, 2], (3,)], None),
    "suppress_tokens": ([], (1, 2), None),
}


@pytest.mark.parametrize(
    "name", [field.name for field in dataclasses.fields(GenerationConfig) if field.name != "extra"]
)
def test_values(name):
    """Every field has a rule, which its default keeps."""
    GenerationConfig().validate()
    for value in WRONG[name]:
        with pytest.raises(ConfigError, match=f"^{name} must be .*, got {re.escape(repr(value))}$"):
            GenerationConfig.from_dict({name: value})
    for value in RIGHT.get(name, ()):
        assert getattr(GenerationConfig.from_dict({name: value}), name) == value


# ------------------------------------------------------------- the plan


def test_what_wins():
    """Options of the call, then its config, then the model's config, then the model's tokens."""
    defaults, given = GenerationConfig(num_beams=2, max_new_tokens=5), GenerationConfig(num_beams=3)
    assert request(defaults=defaults).plan.num_beams == 2
    assert request(defaults=defaults, given=given).plan.num_beams == 3
    assert request(defaults=defaults, given=given).lengths.most == 16
    assert request(defaults=defaults, given=given, num_beams=4).plan.num_beams == 4
    settled = request().plan
    assert (settled.pad, settled.eos, request().bos) == (1, (2,), 0)
    settled = request(given=GenerationConfig(pad_token_id=7, eos_token_id=[5, 6], bos_token_id=9))
    assert (settled.plan.pad, settled.plan.eos, settled.bos) == (7, (5, 6), 9)


LENGTHS = {
    "the default": ({}, Lengths(16, 0)),
    "new tokens": ({"max_new_tokens": 3}, Lengths(3, 0)),
    "all tokens": ({"max_length": 6}, Lengths(2, 0)),
    "of the config": ({"given": GenerationConfig(max_length=6, max_new_tokens=9)}, Lengths(9, 0)),
    "the call's over the config's": ({"given": GenerationConfig(max_new_tokens=9), "max_length": 6}, Lengths(2, 0)),
    "the call's new tokens": ({"given": GenerationConfig(max_length=6), "max_new_tokens": 9}, Lengths(9, 0)),
    "None for new tokens": ({"given": GenerationConfig(max_new_tokens=9), "max_new_tokens": None}, Lengths(16, 0)),
    "at least": ({"min_length": 10}, Lengths(16, 6)),
    "at least, and already there": ({"min_length": 3}, Lengths(16, 0)),
    "at least so many new ones": ({"min_new_tokens": 7, "min_length": 10}, Lengths(16, 7)),
    "no prompt": ({"tokens": 0, "max_length": 5, "min_length": 3}, Lengths(4, 2)),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_lengths(name):
    options, expected = LENGTHS[name]
    assert request(**options).lengths == expected


def test_what_changes_nothing_is_no_part_of_the_plan():
    """So that it is not compiled anew for it."""
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1, "repetition_penalty": 1.0}
    first = request(do_sample=True, top_k=None, **{"no_repeat_ngram_size": 0}).plan
    assert request(do_sample=True, **neutral).plan == first
    assert hash(request(do_sample=True, **neutral).plan) == hash(first)
    assert request(given=GenerationConfig(temperature=0.5, top_p=0.3)).plan == request().plan  # nothing is drawn
    assert request(max_new_tokens=3, min_new_tokens=2).plan == request().plan  # lengths are numbers of a call
    assert request(bad_words_ids=[[3], [4, 5]], suppress_tokens=[7]).plan.suppress == (3, 7)
    assert request(bad_words_ids=[[3], [4, 5], [2]]).plan.bad_words == ((4, 5),)
    assert request(bad_words_ids=[[2]]).plan == request().plan  # the end is no bad word
    assert request(do_sample=True, top_k=1000).plan.top_k == 40
    assert request(do_sample=True).plan.top_k == 40


def test_none_is_a_value():
    """It says that there is no such rule, in a call as in a file; of an option that is absent it says nothing."""
    given = GenerationConfig(do_sample=True, top_k=3, top_p=0.5, min_p=0.1, temperature=2.0, repetition_penalty=1.5)
    off = dict.fromkeys(("top_k", "top_p", "min_p", "temperature", "repetition_penalty"))
    settled = request(given=given, **off).plan
    assert {name: getattr(settled, name) for name in off} == off
    assert request(top_k=None, temperature=None, top_p=None).plan == request().plan  # also where nothing is drawn
    assert request(num_beam_groups=None, stop_strings=None).plan == request().plan
    assert request(num_beams=None, given=GenerationConfig(num_beams=2)).plan.num_beams == 2


def test_rows_and_candidates():
    assert request().plan.rows == 1
    assert request(do_sample=True, num_return_sequences=3).plan.rows == 3
    beams = request(num_beams=4, num_return_sequences=3).plan
    assert (beams.rows, beams.candidates, beams.least_kept) == (4, 8, 2)
    several = request(num_beams=4, eos_token_id=[2, 3, 4]).plan
    assert (several.candidates, several.least_kept) == (16, 4)
    endless = request(num_beams=4, config=CONFIG.replace(eos_token_id=None)).plan
    assert (endless.eos, endless.candidates, endless.least_kept) == ((), 8, 2)
    assert request(eos_token_id=[2, 3]).plan.least_kept == 1


def test_the_beginning():
    """A forced first token comes behind a prompt of one token, and what is suppressed at the beginning behind it."""
    options = {"forced_bos_token_id": 7, "begin_suppress_tokens": [3]}
    for tokens, forced, begin in ((0, 7, 1), (1, 7, 1), (2, None, 0)):
        settled = request(tokens=tokens, **options).plan
        assert (settled.forced_first, settled.begin) == (forced, begin)


def test_without_layers_there_is_no_cache():
    assert request().plan.use_cache
    assert not request(config=CONFIG.replace(num_hidden_layers=0)).plan.use_cache


ABSENT = {
    "num_beam_groups": 2,
    "penalty_alpha": 0.6,
    "force_words_ids": [[3]],
    "stop_strings": ["a"],
    "guidance_scale": 1.5,
    "renormalize_logits": True,
    "cache_implementation": "quantized",
    "output_attentions": True,
    "assistant_model": object(),
    "watermarking_config": {"bias": 1.0},
    "low_memory": True,
}
NEUTRAL = {"num_beam_groups": 1, "renormalize_logits": False, "cache_implementation": "static", "guidance_scale": 1.0}


@pytest.mark.parametrize("name", ABSENT)
def test_what_is_not_there_is_named(name):
    message = f"^{name}=.* is not supported: leave it out. There is max_length, max_new_tokens, "
    with pytest.raises(InputError, match=message):
        request(**{name: ABSENT[name]})
    with pytest.raises(InputError, match=message):
        request(given=GenerationConfig.from_dict({name: ABSENT[name]}))


def test_what_changes_nothing_is_taken():
    """As files say it that transformers has written."""
    assert request(**NEUTRAL).plan == request().plan
    file = GenerationConfig.from_dict({**NEUTRAL, "transformers_version": "4.57.6", "_from_model_config": True})
    assert request(given=file).plan == request().plan


def test_words_of_conflicts():
    """Each is an error that a user can act on; `tests/generation/test_errors.py` has the others, in every backend."""
    with pytest.raises(InputError, match=r"bos_token_id must be at least 0 and below vocab_size \(40\), got 44"):
        request(bos_token_id=44)
    with pytest.raises(InputError, match=r"num_beams=3 needs a vocabulary of more than 3 tokens"):
        request(num_beams=3, config=CONFIG.replace(vocab_size=3), eos_token_id=[0, 1, 2])
    with pytest.raises(InputError, match=r"max_length \(3\) counts the prompt, whose 4 tokens leave no room"):
        request(max_length=3)
    assert request(given=GenerationConfig(temperature=0.5, length_penalty=2.0)).plan.temperature is None  # of a file


# ------------------------------------------------------------- prompts

IDS = np.array([[1, 1, 5, 6], [7, 8, 9, 1], [1, 3, 1, 1]])


def test_prompts_end_with_their_last_token():
    """Padding comes to the front, with positions as they were, and columns that no row needs go."""
    prompt = arrange(CONFIG, request(), IDS, None, None)
    assert prompt.ids.tolist() == [[1, 5, 6], [7, 8, 9], [1, 1, 3]]
    assert prompt.real.tolist() == [[False, True, True], [True] * 3, [False, False, True]]
    assert prompt.positions.tolist() == [[1, 2, 3], [2, 3, 4], [1, 1, 2]]
    assert prompt.next_position.tolist() == [4, 5, 3]
    assert np.array_equal(prompt.shown, IDS)
    assert prompt.embeds is None


def test_rows_get_a_multiple_of_columns():
    plain, wide = (arrange(CONFIG, request(), IDS, None, None, multiple=multiple) for multiple in (1, 8))
    for name, value in (("ids", 1), ("real", False), ("positions", 1)):
        array = getattr(wide, name)
        assert array.shape == (3, 8)
        assert np.array_equal(array[:, 5:], getattr(plain, name))
        assert np.all(array[:, :5] == value)
    assert np.array_equal(wide.next_position, plain.next_position)
    assert np.array_equal(wide.shown, IDS)


def test_masks_say_what_padding_is():
    """Not the ids: a pad token may be seen, and another hidden; positions are by the ids, as in the model's call."""
    mask = np.array([[0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]])
    prompt = arrange(CONFIG, request(), IDS, None, mask)
    assert prompt.ids.tolist() == [[1, 1, 5, 6], [7, 8, 9, 1], [1, 1, 1, 3]]
    assert prompt.real.tolist() == [[False, True, True, True], [True] * 4, [False, False, True, True]]
    assert prompt.positions.tolist() == [[1, 1, 2, 3], [2, 3, 4, 1], [1, 1, 1, 2]]
    assert prompt.next_position.tolist() == [4, 5, 3]
    seen = arrange(CONFIG, request(eos_token_id=[2, 1]), IDS, None, None)
    assert seen.real.all()  # a pad token that ends texts is no padding


def test_embeddings_are_turned_too():
    embeds = np.arange(2 * 3 * 16, dtype=np.float32).reshape(2, 3, 16)
    prompt = arrange(CONFIG, request(3), None, embeds, np.array([[1, 1, 0], [0, 1, 1]]))
    assert prompt.ids is None
    assert np.array_equal(prompt.embeds, np.stack([embeds[0, :2], embeds[1, 1:]]))
    assert prompt.positions.tolist() == [[2, 3], [3, 4]]
    assert prompt.next_position.tolist() == [5, 5]
    assert prompt.shown.shape == (2, 0)


def test_no_prompts():
    for ids, batch, rows in ((None, 1, 1), (None, 3, 3), (np.zeros((2, 0), int), 1, 2)):
        assert arrange(CONFIG, request(0), ids, None, None, batch).ids.tolist() == [[0]] * rows
    assert arrange(CONFIG, request(0, bos_token_id=9), None, None, None).shown.tolist() == [[9]]
    with pytest.raises(InputError, match="starts with bos_token_id, which is None: give input_ids"):
        arrange(CONFIG, request(0, config=CONFIG.replace(bos_token_id=None)), None, None, None)


def test_arguments_stay_as_they_are():
    ids, mask = IDS.copy(), (IDS != 1).astype(int)
    arrange(CONFIG, request(), ids, None, mask, multiple=8)
    assert np.array_equal(ids, IDS)
    assert np.array_equal(mask, IDS != 1)


def test_the_table_has_room():
    """By the longest prompt, without its padding; relative distances count the columns."""
    arrange(CONFIG, request(max_new_tokens=19), IDS, None, None)
    with pytest.raises(InputError, match="at most 22 tokens together: the prompt has 3, which leaves room for 19 new"):
        arrange(CONFIG, request(max_new_tokens=20), IDS, None, None)
    relative = CONFIG.replace(position_embedding_type="relative_key")
    arrange(relative, request(max_new_tokens=21), IDS, None, None)
    with pytest.raises(InputError, match="at most 24 tokens together: the prompt has 3, which leaves room for 21 new"):
        arrange(relative, request(max_new_tokens=22), IDS, None, None)


# ------------------------------------------------------------- the rest


def test_draws_are_checked():
    check_draws(np.array([[0.0, 0.999]]), (1, 2))
    for draws, message in (
        (np.zeros((2, 1)), r"draws must have shape \(1, 2\), got \(2, 1\)"),
        (np.array([[0.0, 1.0]]), "draws must be at least 0 and below 1"),
        (np.array([[0.0, -0.1]]), "draws must be at least 0 and below 1"),
        (np.array([[0.0, np.nan]]), "draws must be at least 0 and below 1"),
    ):
        with pytest.raises(InputError, match=message):
            check_draws(draws, (1, 2))


def test_extras_are_checked():
    drawn, beams = request(do_sample=True).plan, request(num_beams=2).plan
    check_extras(drawn, [len], print, 1, None, None)
    check_extras(beams, [], None, None, None, None)
    for settled, given, message in (
        (beams, {"stopping_criteria": [len]}, "stopping_criteria sees texts that grow at their end only"),
        (beams, {"streamer": print}, "streamer sees texts that grow at their end only"),
        (drawn, {"seed": 0, "generator": object()}, "seed and generator are two sources of chance"),
        (drawn, {"generator": object(), "draws": [0.5]}, "generator and draws are two sources of chance"),
        (beams, {"seed": 0}, "seed has an effect with do_sample=True only"),
    ):
        names = ("stopping_criteria", "streamer", "seed", "generator", "draws")
        with pytest.raises(InputError, match=message):
            check_extras(settled, *(given.get(name) for name in names))


def test_words_of_failures():
    assert str(failure(3, True)).startswith("the logits of new token 3 are not numbers")
    assert str(failure(0, False)).startswith("no token is allowed as new token 0")


def test_a_stream_asks_for_nothing_without_a_target():
    def never():
        raise AssertionError

    stream = Stream(None, never)
    stream.put(never)
    stream.end()
    heard = []
    stream = Stream(heard.append, lambda: "prompts")
    stream.put(lambda: "tokens")
    stream.end()
    assert heard == ["prompts", "tokens"]
