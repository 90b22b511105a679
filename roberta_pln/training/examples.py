"""What a run reads: files of examples as batches, for a model of some config."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from roberta_pln import checkpoint, schema
from roberta_pln.checks import InputError
from roberta_pln.config import RobertaPreLayerNormConfig
from roberta_pln.data import records
from roberta_pln.data.batches import Batches, longest, masker
from roberta_pln.data.features import Features
from roberta_pln.data.packing import BUCKET
from roberta_pln.tokenizer import Tokenizer
from roberta_pln.training.settings import Settings
from roberta_pln.training.tasks import TASKS


class Examples:
    """The examples to learn from, `train`, and perhaps those to measure on, `eval`.

    Args:
        settings: which files, and how they become rows.
        source: the checkpoint that the model starts from, or goes on with; new weights need its config only.
        tokenizer: a directory with the model's.
        goes_on: whether the labels are those of the checkpoint in any case.

    Raises:
        InputError: when a file or an example does not fit the task or the model.
    """

    def __init__(self, settings: Settings, source: Path, tokenizer: Path, goes_on: bool) -> None:
        self.settings, self.task = settings, TASKS[settings.task]
        self.files = {name: Path(path) for name, path in (("train", settings.train), ("eval", settings.eval)) if path}
        self.records = {name: records.read(path, settings.task) for name, path in self.files.items()}
        self.tokenizer = Tokenizer.from_pretrained(tokenizer)
        from_config = settings.fresh and not goes_on
        self.config = (
            RobertaPreLayerNormConfig.from_pretrained(source)
            if from_config
            else checkpoint.open(source).needed_config()
        )
        self.features: dict[str, Features] = {}
        names = self._known_labels(goes_on)
        for name, found in self.records.items():
            self.features[name] = self.task.features(found, self.tokenizer, self.length, settings, names)
            names = self.features["train"].label_names

    @cached_property
    def digests(self) -> dict[str, str]:
        """What the files hold, in short."""
        return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in self.files.items()}

    @property
    def length(self) -> int:
        """Most tokens of a row."""
        most, asked = self.config.max_sequence_length, self.settings.max_length
        if asked is not None and asked > most:
            raise InputError(f"max_length must be at most {most}, which the model can take, got {asked}")
        return asked or most

    def batches(self, few_shapes: bool) -> Batches:
        """The batches to learn from.

        Args:
            few_shapes: whether to pad to few lengths, where every new shape costs time.
        """
        asked = self.settings
        size: dict[str, Any] = {"tokens": asked.tokens} if asked.tokens else {"batch_size": asked.batch_size}
        if asked.pack:
            size["pack"] = self.length
        return self._batches("train", few_shapes, seed=asked.recipe.seed, **size)

    def measured_batches(self, few_shapes: bool) -> Batches:
        """The batches to measure on; the masks of a language model are the same every time."""
        return self._batches("eval", few_shapes, shuffle=False, batch_size=self.settings.eval_batch_size)

    def _batches(self, name: str, few_shapes: bool, **options: Any) -> Batches:
        rows, asked = self.features[name].rows, self.settings
        if few_shapes:
            most = max(map(longest, rows))
            powers = range(BUCKET.bit_length(), (most - 1).bit_length())
            options["lengths"] = [*(2**power for power in powers), most]
        if asked.task == "masked-lm":
            options["label"] = masker(self.tokenizer, asked.mask_rate, asked.mask_scheme, asked.whole_words)
        return Batches(rows, self.tokenizer.pad_token_id, **options)

    def _known_labels(self, goes_on: bool) -> Sequence[str] | None:
        """The names of the labels that the model has learned already; None if these examples name them."""
        if schema.head_of(self.config.architectures) != self.task.head:
            return None
        names = [self.config.id2label[index] for index in range(self.config.num_labels)]
        unnamed = names == [f"LABEL_{index}" for index in range(len(names))]
        return None if unnamed and not goes_on else names
