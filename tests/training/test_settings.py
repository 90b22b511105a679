"""Settings: files, presets, and what is refused."""

import json

import pytest

from roberta_pln.checks import InputError
from roberta_pln.training import settings
from roberta_pln.training.settings import PRESETS, Settings

NEEDED = {"task": "masked-lm", "model": "m", "train": "t.txt", "output": "o"}


def test_keys_are_flat_and_come_back():
    asked = Settings.of({**NEEDED, "learning_rate": 1e-3, "freeze": ["lm_head"], "epochs": 7})
    assert (asked.recipe.learning_rate, asked.recipe.freeze, asked.epochs) == (1e-3, ("lm_head",), 7)
    again = json.loads(json.dumps(asked.to_dict()))
    assert Settings.of(again) == asked
    assert asked.changed(again) == []
    assert again.keys() == settings.texts().keys()


def test_every_key_is_described():
    assert all(text.endswith((".", "`")) for text in settings.texts().values())


def test_what_may_change_when_a_run_goes_on():
    before = Settings.of(NEEDED).to_dict()
    free = {"backend": "tf", "parallel": "mirrored", "until": 5, "save_every": 7, "train": "moved.txt", "output": "p"}
    assert Settings.of({**NEEDED, **free}).changed(before) == []
    assert Settings.of({**NEEDED, "seed": 1, "epochs": 4}).changed(before) == ["epochs", "seed"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.toml", 'task = "masked-lm"\nlearning_rate = 1e-3\nfreeze = ["lm_head"]\n'),
        ("a.yaml", "task: masked-lm\nlearning_rate: 0.001\nfreeze: [lm_head]\n"),
    ],
)
def test_files(tmp_path, name, text):
    pytest.importorskip("yaml")
    (tmp_path / name).write_text(text)
    assert settings.read(tmp_path / name) == {"task": "masked-lm", "learning_rate": 1e-3, "freeze": ["lm_head"]}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "task = masked", "must be TOML: "),
        ("a.yaml", "task: [", "must be YAML: "),
        ("a.yml", "- task", "must hold keys and values, got list"),
        ("a.json", "{}", r"must be a \.yaml, \.yml or \.toml file, got .*a\.json"),
    ],
)
def test_files_that_are_none(tmp_path, name, text, message):
    pytest.importorskip("yaml")
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        settings.read(tmp_path / name)


def test_the_preset_has_the_settings_of_the_paper():
    """The published script of Wettig et al. 2023: 23,000 updates of 4096 rows of 128 tokens, 1380 of them warm-up."""
    asked = Settings.of({**NEEDED, "preset": "efficient-mlm"})
    recipe = asked.recipe
    assert (asked.batch_size, asked.max_length, asked.steps, asked.dropout) == (4096, 128, 23000, 0.1)
    assert (asked.mask_rate, asked.mask_scheme, asked.whole_words) == (0.4, "always", False)
    assert (recipe.beta_1, recipe.beta_2, recipe.epsilon, recipe.clip) == (0.9, 0.98, 1e-6, None)
    assert (recipe.weight_decay, recipe.decayed) == (0.01, "all")
    rates = [recipe.rate(step, asked.steps) for step in range(asked.steps)]
    assert rates[1379] == max(rates) == 2e-3 > rates[1378]
    assert rates[1380 + 21620 // 2] == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(2e-3 / 21620)


def test_what_is_given_wins_over_the_preset():
    assert Settings.of({**NEEDED, "preset": "efficient-mlm", "steps": 5}).steps == 5
    assert set(PRESETS["efficient-mlm"]) <= {*settings.texts()}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"task": "translation"}, "task must be one of classification, regression, .*, got 'translation'"),
        ({"tsak": 1}, "a setting must be one of task, model, .*, got tsak"),
        ({"train": None}, "task, model, train, output must be set, got no train"),
        ({"preset": "x"}, "preset must be one of efficient-mlm, got 'x'"),
        ({"epochs": 0}, "epochs must be an integer of at least 1, got 0"),
        ({"batch_size": 2.5}, "batch_size must be an integer of at least 1, got 2.5"),
        ({"mask_rate": 1.5}, r"mask_rate must be in \[0, 1\), got 1.5"),
        ({"mask_scheme": "never"}, "mask_scheme must be one of always, 80-10-10, got 'never'"),
        ({"metric": "f1"}, "metric of masked-lm must be one of loss, perplexity, accuracy, got 'f1'"),
        ({"patience": 2}, "patience needs measurements to wait for, got no eval: give a file of examples"),
        ({"clip": -1}, "clip must be a positive number, or None, got -1"),
    ],
)
def test_what_is_refused(values, message):
    with pytest.raises(InputError, match=message):
        Settings.of({**NEEDED, **values})
