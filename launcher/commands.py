"""The command `launcher`: hands over to the command that is named, or to the run itself. Imports nothing before."""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module

COMMANDS = {
    "run": "train: launcher [run] RECIPE.yaml --ds FILE",
    "watch": "see a run from any shell, as it goes or as it ended",
    "runs": "list the runs of a run root; runs clean: free space",
    "compare": "runs side by side",
    "predict": "a finished run's answers, line by line",
    "evaluate": "a finished run's metrics again, or on other data",
    "jobs": "runs submitted to a cluster: submit, list, status, follow, stop",
}
"""By name, what a command is for; each is `main` of the module of its name."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the process's exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] and words[0] in COMMANDS:
        return _of(words[0])(words[1:])
    if words[:1] in (["-h"], ["--help"]):
        print(_help())
    return _of("run")(words)


def _of(name: str) -> Callable[[Sequence[str]], int]:
    command: Callable[[Sequence[str]], int] = import_module(f"launcher.{name}").main
    return command


def _help() -> str:
    width = max(map(len, COMMANDS)) + 2
    told = [f"  {name:<{width}}{text}" for name, text in COMMANDS.items()]
    return "\n".join(["commands (each has its own --help):", *told, ""])
