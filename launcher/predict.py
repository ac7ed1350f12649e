"""Answer lines with a trained run: `python -m launcher.predict RUN_DIR < lines`."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import yaml
from pydantic import ValidationError

from launcher import recipe, tasks
from launcher.errors import BadInput, LauncherError, ModelError, nearest

BATCH = 32


def main(argv: Sequence[str] | None = None) -> int:
    """Write one answer line for each input line; return the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        _answer_all(arguments.run_dir, arguments.stage, arguments.input)
    except LauncherError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launcher.predict", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="the run's directory, with recipe.yaml")
    parser.add_argument("--stage", help="whose model to use (default: the last stage's)")
    parser.add_argument("--input", default="-", help="a text file, one line each (default: stdin)")
    return parser


def _answer_all(run_dir: Path, stage_name: str | None, source: str) -> None:
    description = _recipe(run_dir)
    stage = _stage(description, stage_name, run_dir)
    export = run_dir / "stages" / stage.name / "export"
    if not (export / "config.json").is_file():
        raise BadInput(f"{export}: no exported model yet: let stage {stage.name} finish first")
    with _open(source) as lines:
        task = tasks.create(stage)
        trust = description.model.trust_remote_code is not None
        model, tokenizer = _load(export, task.auto_model, trust)
        for batch in _batches(lines):
            for answer in task.predict(model, None, tokenizer, batch):
                # One line each, so that answers can be matched with lines.
                print(" ".join(answer.splitlines()))
            sys.stdout.flush()


def _recipe(run_dir: Path) -> recipe.Recipe:
    path = run_dir / "recipe.yaml"
    try:
        return recipe.parse(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError:
        raise BadInput(f"{path}: cannot be read: give the directory of a run") from None
    except (yaml.YAMLError, ValidationError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BadInput(f"{path}: is no recipe that a run wrote: {reason}") from None


def _stage(description: recipe.Recipe, name: str | None, run_dir: Path) -> recipe.Stage:
    stages = {stage.name: stage for stage in description.stages}
    if name is None:
        return description.stages[-1]
    if name not in stages:
        raise BadInput(
            f'--stage: {run_dir} has no stage "{name}"{nearest(name, stages)}; it has: {", ".join(stages)}'
        )
    return stages[name]


def _open(source: str) -> TextIO:
    try:
        # Standard input is opened by its number, so that closing it leaves sys.stdin alone.
        is_stdin = source == "-"
        return open(0 if is_stdin else source, encoding="utf-8", closefd=not is_stdin)
    except OSError as error:
        raise BadInput(f"--input {source}: cannot be read: {error.strerror}") from None


def _batches(lines: TextIO) -> Iterator[list[str]]:
    try:
        while batch := [line.rstrip("\r\n") for line in islice(lines, BATCH)]:
            yield batch
    except UnicodeDecodeError:
        raise BadInput(f"--input {lines.name}: is not UTF-8 text") from None


def _load(export: Path, auto_model: str, trust: bool) -> tuple[Any, Any]:
    # Imported late: --help and wrong arguments need no torch.
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(export, trust_remote_code=trust)
        model = getattr(transformers, auto_model).from_pretrained(
            export, dtype="auto", trust_remote_code=trust
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{export}: cannot be loaded: {' '.join(str(error).split())[:200]}") from None
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


if __name__ == "__main__":
    sys.exit(main())
