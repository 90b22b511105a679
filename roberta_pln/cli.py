"""The command line: `roberta-pln demo | predict | generate | train | convert | inspect | verify`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from roberta_pln import __version__, backends, checkpoint, schema
from roberta_pln.checkpoint import hub, summary
from roberta_pln.config import DTYPES, RobertaPreLayerNormConfig
from roberta_pln.training import settings
from roberta_pln.training.loop import Run, TrainingError

FAILED, UNUSABLE = 1, 2
"""Exit statuses: what was checked does not hold; what was asked for cannot be done."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    options = parser().parse_args(arguments)
    backends.quiet()
    try:
        return int(COMMANDS[options.command](options))
    except (ValueError, OSError, ImportError, backends.BackendError, TrainingError) as error:
        print(f"roberta-pln: error: {error}", file=sys.stderr)
        return UNUSABLE
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    top = argparse.ArgumentParser(
        prog="roberta-pln", description="RoBERTa-PreLayerNorm in PyTorch, TensorFlow and Flax."
    )
    top.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    commands.add_parser("demo", help="show on the checkpoint that ships with the package that the backends agree")

    predict = commands.add_parser("predict", help="fill <mask> in text; JSON lines out")
    predict.add_argument("path", metavar="PATH", help="a checkpoint with its tokenizer: a directory or a hub id")
    source = predict.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", action="append", help="a text with <mask>; may be given several times")
    source.add_argument("--file", type=Path, help="a file with one text a line")
    predict.add_argument("--backend", choices=tuple(backends.BACKENDS), help="the first that is installed by default")
    predict.add_argument("--dtype", choices=DTYPES, default="float32")
    predict.add_argument("--top", type=int, default=5, metavar="N", help="tokens for each mask (default 5)")

    generate = commands.add_parser("generate", help="continue text with a decoder; JSON lines out")
    generate.add_argument("path", metavar="PATH", help="a decoder with its tokenizer: a directory or a hub id")
    source = generate.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", action="append", help="how a text begins; may be given several times")
    source.add_argument("--file", type=Path, help="a file with one beginning a line")
    generate.add_argument("--backend", choices=tuple(backends.BACKENDS), help="the first that is installed by default")
    generate.add_argument("--dtype", choices=DTYPES, default="float32")
    generate.add_argument("--max-new-tokens", type=int, metavar="N", default=40, help="most new tokens (default 40)")
    generate.add_argument("--beams", type=int, metavar="N", dest="num_beams", help="search with so many beams")
    generate.add_argument("--sample", action="store_true", dest="do_sample", default=None, help="draw the tokens")
    generate.add_argument("--seed", type=int, metavar="N", help="what to draw from (default 0)")
    generate.add_argument("--temperature", type=float, metavar="X", help="divides the scores before drawing")
    generate.add_argument("--top-k", type=int, metavar="N", help="draw from the N most likely tokens")
    generate.add_argument("--top-p", type=float, metavar="X", help="draw from the fewest tokens with this probability")
    generate.add_argument("--repetition-penalty", type=float, metavar="X", help="above 1 avoids tokens that are there")
    generate.add_argument("--no-repeat-ngram-size", type=int, metavar="N", help="no N tokens come twice in a row")
    generate.add_argument(
        "--count", type=int, metavar="N", dest="num_return_sequences", help="continuations of each text"
    )

    train = commands.add_parser("train", help="train a model on examples, or go on with a run that was stopped")
    train.add_argument("--config", type=Path, metavar="FILE", help="settings as YAML or TOML; options win over it")
    train.add_argument(
        "--preset", choices=settings.PRESETS, default=argparse.SUPPRESS, help="settings that a paper found good"
    )
    train.add_argument("--overwrite", action="store_true", help="remove what another run has left in OUTPUT")
    _add_settings(train)

    convert = commands.add_parser("convert", help="write a checkpoint again in another format, type or number of files")
    convert.add_argument("source", metavar="SRC", help="a checkpoint: a directory, a file or a hub id")
    convert.add_argument("target", metavar="DST", type=Path, help="the directory to write; made if it is not there")
    convert.add_argument("--to", required=True, choices=checkpoint.FORMATS, metavar="FORMAT", help=_FORMATS_TEXT)
    _add_reading(convert)
    convert.add_argument("--dtype", choices=DTYPES, help="the type of the tensors; as they are by default")
    convert.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="bytes, or such as 200MB (default 5GB)"
    )
    convert.add_argument("--head", choices=schema.HEADS, help="write this head; the source's by default")
    convert.add_argument("--overwrite", action="store_true", help="replace a checkpoint that DST holds")
    convert.add_argument("--json", metavar="FILE", help="save what was written; - for standard output")

    inspect = commands.add_parser("inspect", help="say what is in a checkpoint")
    inspect.add_argument("path", metavar="PATH", help="a checkpoint: a directory, a file or a hub id")
    _add_reading(inspect)
    inspect.add_argument("--no-digest", action="store_true", help="read headers only")
    inspect.add_argument("--json", metavar="FILE", help="save it all; - for standard output")

    verify = commands.add_parser("verify", help="run a checkpoint in several backends and compare all they compute")
    verify.add_argument("path", metavar="SRC", help="a checkpoint: a directory, a file or a hub id")
    verify.add_argument(
        "converted", metavar="DST", nargs="?", help="another form of it: must hold the same, bit for bit"
    )
    verify.add_argument("--backends", type=_names, metavar="A,B", help="all that are installed by default")
    verify.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32", "float64"])
    verify.add_argument("--text", type=Path, metavar="FILE", help="compare on these lines of text, not on random ids")
    verify.add_argument("--json", metavar="FILE", help="save every difference; - for standard output")
    verify.add_argument("--plot", type=Path, metavar="FILE", help="draw the differences by layer")
    return top


def demo(options: argparse.Namespace) -> int:
    """Show the main job."""
    from roberta_pln import demo as demonstration

    return 0 if demonstration.main() else FAILED


def predict(options: argparse.Namespace) -> int:
    """Fill masks."""
    from roberta_pln.predict import fill_mask

    texts = options.text if options.text else _lines(options.file)
    for result in fill_mask(options.path, texts, options.backend, options.top, options.dtype):
        print(json.dumps(result, ensure_ascii=False), flush=True)
    return 0


def generate(options: argparse.Namespace) -> int:
    """Continue texts."""
    from roberta_pln.continuation import continue_texts

    asked = {name: getattr(options, name) for name in _GENERATION if getattr(options, name) is not None}
    if options.do_sample:
        asked.setdefault("seed", 0)
    texts = options.text if options.text else _lines(options.file)
    for result in continue_texts(options.path, texts, options.backend, options.dtype, **asked):
        print(json.dumps(result, ensure_ascii=False), flush=True)
    return 0


def train(options: argparse.Namespace) -> int:
    """Train a model."""
    known = ("preset", *settings.texts())
    given = {name: value for name, value in vars(options).items() if name in known}
    asked = settings.Settings.of({**(settings.read(options.config) if options.config else {}), **given})
    run = Run(asked, overwrite=options.overwrite, show=sys.stderr.isatty())
    found = run.train()
    if found is not None and run.trainer.is_main:
        print(json.dumps(found))
    return 0


def convert(options: argparse.Namespace) -> int:
    """Write a checkpoint in another form."""
    written = checkpoint.convert(
        _opened(options.source, options),
        options.target,
        options.to,
        head=options.head,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        overwrite=options.overwrite,
        progress=_bytes_written,
    )
    return _show(checkpoint.inspect(written, digest=False), options)


def inspect(options: argparse.Namespace) -> int:
    """Describe a checkpoint."""
    return _show(checkpoint.inspect(_opened(options.path, options), digest=not options.no_digest), options)


def verify(options: argparse.Namespace) -> int:
    """Compare two forms of a checkpoint, and backends."""
    from roberta_pln import parity

    path, found = options.path, []
    if options.converted is not None:
        found = _compare(options.path, options.converted)
        path = options.converted
    inputs = None if options.text is None else parity.text_inputs(path, list(_lines(options.text)))
    reports = parity.compare_all(path, options.backends, inputs, options.dtype, progress=_progress)
    if options.json:
        _write(parity.to_json(reports, found), options.json)
    if options.json != "-":
        for line in found:
            print(line)
        print("Largest differences (gradients: relative to each gradient's largest entry; ! is above tolerance)")
        for report in reports:
            print(report.table())
    if options.plot:
        parity.save_plot(reports, options.plot)
    return 0 if not found and all(report.passed for report in reports) else FAILED


def _compare(source: str, converted: str) -> list[str]:
    """What two checkpoints do not share: values of the config, and tensors."""
    left, right = (checkpoint.open(hub.find_checkpoint(path)) for path in (source, converted))
    found = summary.differences(left, right, lambda done, total: None)
    if left.config is not None and right.config is not None:
        ours, theirs = (
            config.replace(dtype=None, architectures=None).to_dict() for config in (left.config, right.config)
        )
        found += [
            f"{key} of the config is {ours.get(key)!r} and {theirs.get(key)!r}"
            for key in ours | theirs
            if ours.get(key) != theirs.get(key)
        ]
    if not found:
        _progress(f"{len(left)} tensors are the same, bit for bit")
    return found


COMMANDS = {
    "demo": demo,
    "predict": predict,
    "generate": generate,
    "train": train,
    "convert": convert,
    "inspect": inspect,
    "verify": verify,
}

_GENERATION = (
    "max_new_tokens",
    "num_beams",
    "do_sample",
    "seed",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "num_return_sequences",
)
"""Options of the command that go to the model as they are."""

_FORMATS_TEXT = f"one of {', '.join(checkpoint.FORMATS)}"


def _add_settings(command: argparse.ArgumentParser) -> None:
    """An option for every setting; what is not given is left to the file, and then to the default."""
    defaults = settings.defaults()
    for name, text in settings.texts().items():
        default = defaults.get(name)
        shown = "" if default in (None, (), False) else f" (default {default})"
        command.add_argument(
            f"--{name.replace('_', '-')}",
            help=text.rstrip(".") + shown,
            default=argparse.SUPPRESS,
            **_OPTIONS_OF.get(settings.kind(name), {"metavar": "NAME"}),
        )


def _number_or_none(text: str) -> float | None:
    return None if text == "none" else float(text)


_OPTIONS_OF: dict[str, dict[str, Any]] = {
    "int": {"type": int, "metavar": "N"},
    "float": {"type": _number_or_none, "metavar": "X"},
    "bool": {"action": argparse.BooleanOptionalAction},
    "tuple[str, ...]": {"nargs": "+", "metavar": "PATH"},
}
"""How a setting is read that is no text; `none` is a number that is not there, such as that of `--clip`."""


def _add_reading(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--from",
        dest="from_format",
        choices=checkpoint.FORMATS,
        metavar="FORMAT",
        help="what to read where several are",
    )
    command.add_argument(
        "--config", type=Path, metavar="FILE", help="a config.json, instead of the one beside the weights"
    )
    command.add_argument("--classification-head", metavar="NAME", help="the one to read of several in a fairseq file")


def _opened(path: str, options: argparse.Namespace) -> checkpoint.Checkpoint:
    config = None if options.config is None else RobertaPreLayerNormConfig.from_json_file(options.config)
    found = hub.find_checkpoint(path)
    return checkpoint.open(found, config, options.from_format, classification_head=options.classification_head)


def _show(found: summary.Summary, options: argparse.Namespace) -> int:
    """Print what was found, and save it as JSON if that is asked for."""
    if options.json:
        _write(json.dumps(found.to_dict(), indent=2) + "\n", options.json)
    if options.json != "-":
        print(found)
    return 0


def _write(text: str, path: str) -> None:
    """Write a file, or to standard output."""
    if path == "-":
        print(text, end="")
    else:
        Path(path).write_text(text, encoding="utf-8")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _bytes_written(done: int, total: int) -> None:
    if sys.stderr.isatty():
        end = "\n" if done == total else "\r"
        print(f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB written", end=end, file=sys.stderr, flush=True)


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _lines(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield line.rstrip("\n")


if __name__ == "__main__":
    sys.exit(main())
