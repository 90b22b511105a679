"""Text to ids and back: RoBERTa's byte-level BPE, through the `tokenizers` library (extra `text`)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

BOS: Final = "<s>"
PAD: Final = "<pad>"
EOS: Final = "</s>"
UNK: Final = "<unk>"
MASK: Final = "<mask>"
SPECIAL_TOKENS: Final = (BOS, PAD, EOS, UNK, MASK)
"""RoBERTa's special tokens. A tokenizer trained here gives the first four the ids 0 to 3 and `<mask>` the last id."""

TOKENIZER_FILE: Final = "tokenizer.json"
VOCABULARY_FILES: Final = ("vocab.json", "merges.txt")
_NAMES: Final = {
    "bos_token": BOS,
    "eos_token": EOS,
    "sep_token": EOS,
    "cls_token": BOS,
    "unk_token": UNK,
    "pad_token": PAD,
}
"""Roles of the special tokens in `tokenizer_config.json`, less `mask_token`, which is stored with its flags."""
_CHUNK: Final = 1024
"""Texts that are encoded at once; an encoding takes much more memory than its ids."""


class Tokenizer:
    """Byte-level BPE with RoBERTa's special tokens.

    One text becomes `<s> A </s>`, a pair `<s> A </s></s> B </s>`. Every string can be encoded, and decodes to itself.
    `<mask>` in a text is the mask token and takes the space before it along.

    Args:
        backend: a `tokenizers.Tokenizer` whose vocabulary holds the five special tokens.
        max_length: longest sequence of the model it belongs to; only written by `save_pretrained`.

    Raises:
        ValueError: when a special token is missing.
    """

    def __init__(self, backend: Any, max_length: int | None = None) -> None:
        missing = [token for token in SPECIAL_TOKENS if backend.token_to_id(token) is None]
        if missing:
            raise ValueError(
                f"a RoBERTa vocabulary must hold {', '.join(SPECIAL_TOKENS)}, but {', '.join(missing)} is missing: "
                "these files belong to another kind of tokenizer"
            )
        backend.no_padding()  # a tokenizer.json may carry settings of its last use
        backend.no_truncation()
        self._backend = backend
        self.max_length = max_length

    # ------------------------------------------------------------------ files

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **options: Any) -> Tokenizer:
        """Read a tokenizer.

        Args:
            path: a directory with `tokenizer.json`, or with `vocab.json` and `merges.txt`; or a hub id. A file stands
                for its directory.
            options: the hub's keywords (`revision`, `cache_dir`, `token`, `local_files_only`, ...).

        Raises:
            FileNotFoundError: when the directory holds none of these files.
            ImportError: when the `tokenizers` library is not installed.
            ValueError: when a file cannot be read as a RoBERTa tokenizer.
        """
        library = _library()
        directory = _directory(path, options)
        whole, parts = directory / TOKENIZER_FILE, [directory / name for name in VOCABULARY_FILES]
        if whole.is_file():
            return cls(_parsed(library, whole), _max_length(directory))
        if all(part.is_file() for part in parts):
            vocabulary, merges = library.models.BPE.read_file(*map(str, parts))
            return cls(_assemble(library, vocabulary, merges), _max_length(directory))
        raise FileNotFoundError(
            f"no tokenizer in {directory}: looked for {TOKENIZER_FILE}, and for {' with '.join(VOCABULARY_FILES)}. "
            "Copy the tokenizer's files next to the checkpoint, or name the directory that holds them"
        )

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json`, which transformers reads too.

        Args:
            directory: made if it is not there.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        mask = {"content": MASK, "lstrip": True, "normalized": False, "rstrip": False, "single_word": False}
        names: dict[str, Any] = {**_NAMES, "mask_token": mask}
        settings = {**names, "add_prefix_space": False, "tokenizer_class": "RobertaTokenizer"}
        if self.max_length is not None:
            settings["model_max_length"] = self.max_length
        _write(directory / TOKENIZER_FILE, self._backend.to_str())
        _write(directory / "tokenizer_config.json", json.dumps(settings, indent=2, sort_keys=True) + "\n")
        _write(directory / "special_tokens_map.json", json.dumps(names, indent=2, sort_keys=True) + "\n")

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, max_length: int | None = None) -> Tokenizer:
        """Learn a vocabulary: the special tokens, the 256 bytes, and the merges that occur most often.

        Args:
            texts: the training texts.
            vocab_size: most tokens of the vocabulary, special tokens included; a small corpus may yield fewer.
            max_length: longest sequence of the model it is meant for.

        Raises:
            ImportError: when the `tokenizers` library is not installed.
            ValueError: when `vocab_size` has no room for the special tokens and the bytes.
        """
        library = _library()
        least = len(SPECIAL_TOKENS) + 256
        if vocab_size < least:
            raise ValueError(f"vocab_size must be at least {least} (special tokens and bytes), got {vocab_size}")
        learner = _assemble(library, {}, [])
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size - 1,  # <mask> comes last
            special_tokens=[BOS, PAD, EOS, UNK],
            initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        learner.train_from_iterator(texts, trainer)
        model = json.loads(learner.to_str())["model"]
        vocabulary = {**model["vocab"], MASK: len(model["vocab"])}
        return cls(_assemble(library, vocabulary, [tuple(pair) for pair in model["merges"]]), max_length)

    # ------------------------------------------------------------------ text to ids

    def encode(self, text: str, pair: str | None = None) -> list[int]:
        """The ids of one text, or of a pair of texts, with special tokens."""
        return list(self._backend.encode(text, pair).ids)

    def encode_with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a text without special tokens, and where each token stands in it.

        Returns:
            The ids, and as many spans: `text[start:end]` is what the token stands for, without spaces around it, so it
            may be empty. The tokens of a character that takes several all have its span.
        """
        encoding = self._backend.encode(text, add_special_tokens=False)
        return list(encoding.ids), [_without_spaces(text, *span) for span in encoding.offsets]

    def encode_rows(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, max_length: int | None = None
    ) -> tuple[list[list[int]], int]:
        """The ids of texts, or of pairs of texts, with special tokens, not padded.

        Args:
            texts: the texts, at least one.
            pairs: the second texts, as many as `texts`.
            max_length: longer rows are cut, tokens at the end of the longer text first; `None` cuts none.

        Returns:
            A list of ids for each text, and the number of those that were cut.

        Raises:
            ValueError: when `pairs` are not as many as `texts`, or when there are no texts.
        """
        if not texts:
            raise ValueError("at least one text is needed, got none")
        if pairs is not None and len(pairs) != len(texts):
            raise ValueError(f"pairs must be as many as texts, got {len(pairs)} pairs for {len(texts)} texts")
        inputs: list[Any] = list(texts if pairs is None else zip(texts, pairs, strict=True))
        rows: list[list[int]] = []
        cut = 0
        if max_length is not None:
            self._backend.enable_truncation(max_length)
        try:
            for start in range(0, len(inputs), _CHUNK):
                for encoding in self._backend.encode_batch(inputs[start : start + _CHUNK]):
                    rows.append(list(encoding.ids))
                    cut += bool(encoding.overflowing)
        finally:
            self._backend.no_truncation()
        return rows, cut

    def __call__(
        self,
        texts: str | Sequence[str],
        pairs: str | Sequence[str] | None = None,
        max_length: int | None = None,
        padding: Literal["longest", False] | int = "longest",
        truncation: bool = False,
    ) -> dict[str, NDArray[np.int64]]:
        """Encode a batch.

        Args:
            texts: one text or several; one text is a batch of one.
            pairs: the second texts, as many as `texts`.
            max_length: most tokens of a row, special tokens included.
            padding: `"longest"` pads on the right to the longest row, a number pads to that length, `False` does not
                pad and needs rows of equal length.
            truncation: cut rows longer than `max_length`, tokens at the end of the longer text first.

        Returns:
            `input_ids` and `attention_mask` (1 token, 0 padding), int64 of shape (B, T).

        Raises:
            ValueError: when a row is longer than `max_length` or `padding` and `truncation` is off, when rows of
                unequal length are not padded, when `pairs` are not as many as `texts`, or when there are no texts.
        """
        cut_at = max_length if truncation else None
        rows, _ = self.encode_rows(_batch(texts), None if pairs is None else _batch(pairs), cut_at)
        longest = max(len(row) for row in rows)
        if max_length is not None and longest > max_length:
            raise ValueError(
                f"a text must have at most max_length={max_length} tokens, got {longest}: "
                "shorten it, raise max_length, or pass truncation=True"
            )
        width = _width(rows, padding)
        input_ids = np.full((len(rows), width), self.pad_token_id, dtype=np.int64)  # (B, T)
        attention_mask = np.zeros((len(rows), width), dtype=np.int64)  # (B, T)
        for index, row in enumerate(rows):
            input_ids[index, : len(row)] = row
            attention_mask[index, : len(row)] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    # ------------------------------------------------------------------ ids to text

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of a sequence of ids (integers, or a NumPy array of shape (T,)).

        Raises:
            ValueError: when an id is not in the vocabulary.
        """
        ids = [int(index) for index in ids]
        for index in ids:
            self.id_to_token(index)
        return str(self._backend.decode(ids, skip_special_tokens=skip_special_tokens))

    def id_to_token(self, index: int) -> str:
        """The token of an id, as the vocabulary spells it (a leading space is `Ġ`).

        Raises:
            ValueError: when the id is not in the vocabulary.
        """
        token = self._backend.id_to_token(int(index)) if index >= 0 else None
        if token is None:
            raise ValueError(f"an id must be in [0, {self.vocab_size}), got {index}")
        return str(token)

    def token_to_id(self, token: str) -> int:
        """The id of a token, spelled as in the vocabulary.

        Raises:
            ValueError: when the vocabulary does not have it.
        """
        index = self._backend.token_to_id(token)
        if index is None:
            raise ValueError(f"the vocabulary does not have the token {token!r}")
        return int(index)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included."""
        return int(self._backend.get_vocab_size())

    @property
    def bos_token_id(self) -> int:
        """Id of `<s>`."""
        return self.token_to_id(BOS)

    @property
    def pad_token_id(self) -> int:
        """Id of `<pad>`."""
        return self.token_to_id(PAD)

    @property
    def eos_token_id(self) -> int:
        """Id of `</s>`."""
        return self.token_to_id(EOS)

    @property
    def unk_token_id(self) -> int:
        """Id of `<unk>`, which byte-level BPE never produces by itself."""
        return self.token_to_id(UNK)

    @property
    def mask_token_id(self) -> int:
        """Id of `<mask>`."""
        return self.token_to_id(MASK)

    @property
    def word_starts(self) -> NDArray[np.bool_]:
        """(V,): whether a token begins a word, which is to say that a space leads it (`Ġ`)."""
        return np.array([self.id_to_token(index).startswith("Ġ") for index in range(self.vocab_size)])

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Ids of the five special tokens, ascending."""
        return tuple(sorted(self.token_to_id(token) for token in SPECIAL_TOKENS))


def _library() -> Any:
    """The `tokenizers` library, imported on first use so that the package works without it."""
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "turning text into ids needs the tokenizers library: pip install 'roberta_pln[text]'"
        ) from error
    return tokenizers


def _assemble(library: Any, vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Any:
    """RoBERTa's pipeline around a BPE vocabulary."""
    backend = library.Tokenizer(library.models.BPE(vocabulary, merges))
    backend.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = library.decoders.ByteLevel()
    if all(token in vocabulary for token in SPECIAL_TOKENS):  # the constructor reports what is missing
        ends = (EOS, vocabulary[EOS]), (BOS, vocabulary[BOS])
        backend.post_processor = library.processors.RobertaProcessing(*ends, trim_offsets=True, add_prefix_space=False)
        backend.add_special_tokens([library.AddedToken(token, lstrip=token == MASK) for token in SPECIAL_TOKENS])
    return backend


def _directory(path: str | os.PathLike[str], options: dict[str, Any]) -> Path:
    from roberta_pln.checkpoint import hub

    found = hub.find_checkpoint(path, **options)
    return found if found.is_dir() else found.parent


def _parsed(library: Any, path: Path) -> Any:
    try:
        return library.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises plain Exception for every malformed file
        raise ValueError(f"{path} is not a tokenizer file: {error}") from error


def _max_length(directory: Path) -> int | None:
    path = directory / "tokenizer_config.json"
    if not path.is_file():
        return None
    length = json.loads(path.read_text(encoding="utf-8")).get("model_max_length")
    return length if isinstance(length, int) and length < 10**9 else None  # transformers writes 10**30 for "unknown"


def _write(path: Path, text: str) -> None:
    from roberta_pln.checkpoint import atomic

    with atomic.writing(path) as file:
        file.write(text.encode("utf-8"))


def _without_spaces(text: str, start: int, end: int) -> tuple[int, int]:
    while start < end and text[start] == " ":
        start += 1
    while start < end and text[end - 1] == " ":
        end -= 1
    return start, end


def _batch(texts: str | Sequence[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)


def _width(rows: list[list[int]], padding: Literal["longest", False] | int) -> int:
    lengths = {len(row) for row in rows}
    if padding == "longest":
        return max(lengths)
    if padding is False:
        if len(lengths) > 1:
            raise ValueError(f"rows must have equal length when padding is off, got lengths {sorted(lengths)}")
        return max(lengths)
    if isinstance(padding, bool) or not isinstance(padding, int):
        raise ValueError(f"padding must be 'longest', a length or False, got {padding!r}")
    if max(lengths) > padding:
        raise ValueError(f"a row must have at most padding={padding} tokens, got {max(lengths)}: raise padding")
    return padding
