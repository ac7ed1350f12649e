"""Answer lines with a trained run: `python -m launcher.predict RUN_DIR < lines`."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TextIO

from launcher import finished, tasks
from launcher.errors import BadInput, LauncherError, tell

BATCH = 32


def main(argv: Sequence[str] | None = None) -> int:
    """Write one answer line for each input line; return the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        _answer_all(arguments.run_dir, arguments.stage, arguments.input)
    except LauncherError as error:
        return tell(error)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launcher.predict", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="the run's directory, with recipe.yaml")
    parser.add_argument("--stage", help="whose model to use (default: the last stage's)")
    parser.add_argument("--input", default="-", help="a text file, one line each (default: stdin)")
    return parser


def _answer_all(run_dir: Path, stage_name: str | None, source: str) -> None:
    stage = finished.find(run_dir, stage_name)
    with _open(source) as lines:
        task = tasks.create(stage.stage)
        model, extra, tokenizer = finished.load(stage, task)
        if is_typed := lines.isatty():
            print("one answer for each line; Ctrl-D ends", file=sys.stderr)
        for batch in _batches(lines, 1 if is_typed else BATCH):
            for answer in task.predict(model, extra, tokenizer, batch):
                # One line each, so that answers can be matched with lines.
                print(" ".join(answer.splitlines()))
            sys.stdout.flush()


def _open(source: str) -> TextIO:
    try:
        # Standard input is opened by its number, so that closing it leaves sys.stdin alone.
        is_stdin = source == "-"
        return open(0 if is_stdin else source, encoding="utf-8", closefd=not is_stdin)
    except OSError as error:
        raise BadInput(f"--input {source}: cannot be read: {error.strerror}") from None


def _batches(lines: TextIO, size: int) -> Iterator[list[str]]:
    try:
        while batch := [line.rstrip("\r\n") for line in islice(lines, size)]:
            yield batch
    except UnicodeDecodeError:
        raise BadInput(f"--input {lines.name}: is not UTF-8 text") from None


if __name__ == "__main__":
    sys.exit(main())
