"""The launcher's programs, as a command of a document starts them."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher import evaluate, jobs, options, predict
from launcher.recipes import train_tokenizer
from tests.conftest import ROOT

PARSERS = {
    "run": options.parser,
    "jobs": jobs._parser,
    "predict": predict._parser,
    "evaluate": evaluate._parser,
    "train_tokenizer": train_tokenizer._parser,
}


def program(words: list[str]) -> tuple[str, list[str]] | None:
    """Return which of the launcher's programs a command starts, by its module's name, and its arguments."""
    if "--" in words and words[0] in ("ray", "sbatch"):
        words = words[words.index("--") + 1 :]
    elif words[0] == "sbatch":
        words = words[next(i for i, word in enumerate(words) if word.endswith("python")) :]
    first = words[0].rpartition("/")[2]
    if first == "launcher":
        module = words[1] if len(words) > 1 and (ROOT / "launcher" / f"{words[1]}.py").exists() else "run"
        return module, words[2:] if module != "run" else words[1:]
    if first.startswith("launcher-"):
        return first.removeprefix("launcher-"), words[1:]
    if first == "python" and words[1:2] == ["-m"] and words[2].startswith("launcher."):
        return words[2].removeprefix("launcher."), words[3:]
    if first == "python" and words[1:2] and words[1].startswith("launcher/"):
        return Path(words[1]).stem, words[2:]
    return None


def parsed(module: str, arguments: list[str]) -> Any:
    """Parse arguments by the program's own parser; what a job is to run, by that one's."""
    make = PARSERS.get(module)
    if make is None:
        found = importlib.import_module(f"launcher.{module}")
        # A command of a command has a parser of its own: runs clean.
        if arguments and (of_word := getattr(found, f"{arguments[0]}_parser", None)):
            return of_word().parse_args(arguments[1:])
        make = getattr(found, "parser", None) or getattr(found, "_parser", None)
        if make is None:
            assert callable(found.main), f"{module} is no program"
            return None  # It takes words by their place, and no options.
    if {"--help", "-h"} & set(arguments):
        return make()
    given = make().parse_args(arguments)
    if module == "jobs" and getattr(given, "arguments", None):
        return parsed("run", [each for each in given.arguments if each != "--"])
    return given


def all_parsers() -> list[Callable[[], Any]]:
    """Return what makes the parser of each command, and of each command's commands."""
    found = list(PARSERS.values())
    for name in ("watch", "runs", "compare"):
        if (ROOT / "launcher" / f"{name}.py").exists():
            module = importlib.import_module(f"launcher.{name}")
            found += [
                make for each, make in vars(module).items() if each.endswith("parser") and callable(make)
            ]
    return found
