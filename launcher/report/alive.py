"""Whether the driver of a run lives, as far as its run directory and this machine tell."""

import socket
import time
from pathlib import Path
from typing import Any

import psutil

FRESH_S = 35.0
"""A driver writes its report every 10 to 30 s (`ending`): one so fresh is of a driver that lives."""
SHARED_CLOCK_S = 120.0
"""How far the clocks of a driver's machine, of the storage and of this machine may be apart."""
_TELLING = ("recipe.yaml", "report.json", "metrics.jsonl")


def is_alive(verdict: dict[str, Any], report: dict[str, Any], seen_s: float) -> bool:
    """Return whether a run's driver lives, as far as can be seen from here.

    Args:
        verdict: of a run that has not ended: its driver's host and process.
        report: its report.json.
        seen_s: as `seen_s` returns it.
    """
    if abs(time.time() - seen_s) < FRESH_S:
        return True
    if verdict.get("host") == socket.gethostname():
        return _is_process(verdict.get("pid"), report.get("begun"))
    return abs(time.time() - seen_s) < SHARED_CLOCK_S


def seen_s(run_dir: Path) -> float:
    """Return when something was written that tells of the driver or the workers; 0: never."""
    found = [0.0]
    for name in _TELLING:
        try:
            found.append((run_dir / name).stat().st_mtime)
        except OSError:
            continue
    return max(found)


def _is_process(pid: Any, begun_s: Any) -> bool:
    """Return whether a process is there that was before a time: numbers are given again."""
    try:
        return bool(psutil.Process(int(pid)).create_time() <= float(begun_s) + 1)
    except (psutil.Error, TypeError, ValueError):
        return False
