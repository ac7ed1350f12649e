"""What all questions share: figures with their aims, alternation of what is compared, the machine."""

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGES = ("tokenizers", "transformers", "datasets", "ray", "pyarrow", "numpy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One line of the answer.

    Attributes:
        name: what was measured.
        value: how much.
        unit: of what.
        aim: what it should be, in words; "" if it only explains another.
        is_met: whether it is so; None without an aim.
    """

    name: str
    value: float
    unit: str
    aim: str = ""
    is_met: bool | None = None


def at_least(name: str, value: float, unit: str, aim: float) -> Figure:
    """Return a figure that should not be smaller than `aim`."""
    return Figure(name=name, value=value, unit=unit, aim=f">= {aim:g}", is_met=value >= aim)


def at_most(name: str, value: float, unit: str, aim: float) -> Figure:
    """Return a figure that should not be larger than `aim`."""
    return Figure(name=name, value=value, unit=unit, aim=f"<= {aim:g}", is_met=value <= aim)


@dataclass(frozen=True, slots=True)
class Time:
    """What a piece of work took: of the clock, and of this process's processor time."""

    wall_s: float
    cpu_s: float


def timed(work: Callable[[], Any]) -> tuple[Time, Any]:
    """Do something; return what it took, and its result."""
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    result = work()
    return Time(time.perf_counter() - wall_s, time.process_time() - cpu_s), result


def alternate(ways: Sequence[Callable[[int], float]], num_rounds: int) -> list[list[float]]:
    """Let several ways take turns, so that what else the machine does falls on all alike.

    Args:
        ways: each is given the number of the round and returns its figure.
        num_rounds: how often; who is first changes from round to round.

    Returns:
        The figures of each way.
    """
    figures: list[list[float]] = [[] for _ in ways]
    for number in range(num_rounds):
        for turn in range(len(ways)):
            way = (turn + number) % len(ways)
            figures[way].append(ways[way](number))
    return figures


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the median of the ratios of what was measured side by side."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def machine() -> dict[str, Any]:
    """Describe the machine; without names."""
    models = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = [line for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    return {
        "cores": os.cpu_count(),
        "cpu": models[0].partition(":")[2].strip() if models else platform.processor(),
        "memory_gb": round(int(memory[0].split()[1]) / 1e6) if memory else None,
        "load_at_start": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def table(answers: dict[str, list[Figure]]) -> str:
    """Return the answers for a person."""
    names = [figure.name for figures in answers.values() for figure in figures]
    width = max(map(len, names), default=0)
    lines = []
    for question, figures in answers.items():
        lines.append(f"\n{question}")
        for figure in figures:
            verdict = {None: "", True: "met", False: "MISSED"}[figure.is_met]
            value = f"{figure.value:,.4g}" if abs(figure.value) < 1000 else f"{figure.value:,.0f}"
            aim = f"  aim {figure.aim:<8} {verdict}" if figure.aim else ""
            lines.append(f"  {figure.name:<{width}}  {value:>14} {figure.unit:<16}{aim}".rstrip())
    return "\n".join(lines)


def _lines(file: str) -> list[str]:
    path = Path(file)
    return path.read_text().splitlines() if path.exists() else []
