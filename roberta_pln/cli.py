"""The command line: `roberta-pln demo | predict | verify`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from roberta_pln import __version__, backends
from roberta_pln.config import DTYPES

FAILED, UNUSABLE = 1, 2
"""Exit statuses: what was checked does not hold; what was asked for cannot be done."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    options = parser().parse_args(arguments)
    backends.quiet()
    try:
        return int(COMMANDS[options.command](options))
    except (ValueError, OSError, ImportError, backends.BackendError) as error:
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

    verify = commands.add_parser("verify", help="run a checkpoint in several backends and compare all they compute")
    verify.add_argument("path", metavar="PATH", help="a checkpoint: a directory, a file or a hub id")
    verify.add_argument("--backends", type=_names, metavar="A,B", help="all that are installed by default")
    verify.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32", "float64"])
    verify.add_argument("--text", type=Path, metavar="FILE", help="compare on these lines of text, not on random ids")
    verify.add_argument("--json", type=Path, metavar="FILE", help="save every difference")
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


def verify(options: argparse.Namespace) -> int:
    """Compare backends."""
    from roberta_pln import parity

    inputs = None if options.text is None else parity.text_inputs(options.path, list(_lines(options.text)))
    reports = parity.compare_all(options.path, options.backends, inputs, options.dtype, progress=_progress)
    print("Largest differences (gradients: relative to each gradient's largest entry; ! marks what is above tolerance)")
    for report in reports:
        print(report.table())
    if options.json:
        parity.save_json(reports, options.json)
    if options.plot:
        parity.save_plot(reports, options.plot)
    return 0 if all(report.passed for report in reports) else FAILED


COMMANDS = {"demo": demo, "predict": predict, "verify": verify}


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _lines(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield line.rstrip("\n")


if __name__ == "__main__":
    sys.exit(main())
