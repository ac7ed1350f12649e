"""The runs of a run root: which there are, and in what state each is, by its files alone."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launcher import storage
from launcher.errors import RecipeError, RunExists, nearest
from launcher.report import alive, opened
from launcher.report.history import BREAKS
from launcher.report.record import Event
from launcher.report.tail import Tail

State = Literal["done", "running", "stopped", "failed", "driver lost", "unreadable"]
RECIPE, REPORT, SUMMARY, RECORD = "recipe.yaml", "report.json", "summary.json", "metrics.jsonl"
_STOPPED = ("stopped by the user", "preempted")
_HIDDEN = "."


@dataclass(frozen=True, slots=True)
class Run:
    """One run directory.

    Attributes:
        name: below the run root.
        kind: of its verdict, in the words of the report; of an unreadable run, why it is that.
        report: its report.json; empty: none was written yet.
        seen_s: when its driver or its workers last wrote anything that tells of them.
    """

    name: str
    path: Path
    state: State
    kind: str
    exit_code: int
    report: dict[str, Any]
    seen_s: float


def roots(given: str | None) -> list[Path]:
    """Return the run roots that are meant: the one given, or where runs are kept if none is.

    Raises:
        RecipeError: there is no such directory.
    """
    named = given or os.environ.get("LAUNCHER_RUN_ROOT")
    if named is not None:
        root = Path(named).expanduser().absolute()
        if not root.is_dir():
            raise RecipeError(f"--run-root {named}: there is no such directory")
        return [root]
    # What a submitted job makes is in the second.
    places = [Path("runs").absolute(), Path.home() / "launcher-runs"]
    return [place for place in places if place.is_dir()]


def all_in(root: Path) -> list[Run]:
    """Return the runs of a run root, those of several seeds and of trials too, in the order of their beginning."""
    found = []
    for path in sorted(root.iterdir()):
        if path.name.startswith(_HIDDEN) or not path.is_dir():
            continue
        places = [*path.glob(RECIPE), *sorted(path.glob(f"*/{RECIPE}"))]
        found += [look(place.parent, root) for place in places]
    return sorted(found, key=lambda run: run.report.get("begun") or run.seen_s)


def find(text: str, places: Sequence[Path]) -> Run:
    """Return the run that a directory or a name means.

    Args:
        text: a run directory, or a run's name in one of the run roots.
        places: the run roots.

    Raises:
        RunExists: there is no such run.
    """
    for path in (Path(text).absolute(), *(root / text for root in places)):
        if (path / RECIPE).is_file():
            return look(path, root_of(path, places))
        if seeds := [
            look(each, root_of(each, places)) for each in opened.seeds(path) if (each / RECIPE).is_file()
        ]:
            return next((run for run in seeds if run.state == "running"), seeds[-1])
    known = [run.name for root in places for run in all_in(root)]
    where = ", ".join(map(str, places)) or "runs or ~/launcher-runs (--run-root names another place)"
    raise RunExists(f"{text}: no run directory, nor a run in {where}{nearest(text, known)}")


def root_of(path: Path, places: Sequence[Path]) -> Path:
    """Return the run root that a run directory is in; one elsewhere is in the directory above it."""
    return next((root for root in places if path.is_relative_to(root)), path.parent)


def look(path: Path, root: Path) -> Run:
    """Return what the files of a run directory say."""
    seen_s = alive.seen_s(path)
    try:
        report = storage.read_json(path / REPORT)
    except OSError as error:
        return Run(str(path.relative_to(root)), path, "unreadable", str(error), 1, {}, seen_s)
    report = report if isinstance(report, dict) else {}
    verdict = report.get("verdict")
    verdict = verdict if isinstance(verdict, dict) else {}
    kind = verdict.get("kind", "running")
    if kind == "running":
        state: State = "running" if alive.is_alive(verdict, report, seen_s) else "driver lost"
        if (path / SUMMARY).is_file() and state != "running":
            state, kind = "done", "done"  # Written last but one; or by a version that wrote no report.
    else:
        state = "done" if kind == "done" else "stopped" if kind in _STOPPED else "failed"
    kind = state if state == "driver lost" else kind
    code = verdict.get("exit_code", 0 if state in ("done", "running") else 1)
    return Run(str(path.relative_to(root)), path, state, kind, code, report, seen_s)


def events(run: Run, tail: Tail) -> list[Event]:
    """Return what brings a view to where a run is: out of its files, and of its record only the end.

    Args:
        run: which.
        tail: of its record; it then goes on from there.
    """
    begin = opened.event(run.path)
    done = [stage["name"] for stage in begin["stages"] if stage["is_done"]]
    begin |= {} if run.state == "running" else {"said": ""}
    told = run.report.get("events") or []
    # In the record the last checkpoint may be far from the end; of its stall the record's sums tell.
    saved = [{**event, "stall_s": 0.0} for event in told if event["kind"] == "checkpoint"][-1:]
    ended = [{"kind": "stage_done", "stage": name, **(opened.done(run.path, name) or {})} for name in done]
    return [begin, *tail.last(), *saved, restarts(run), *ended]


def restarts(run: Run) -> Event:
    """Return how often workers began anew in this try, as an event for a view."""
    told = run.report.get("events") or []
    return {"kind": "report", "restarts": sum(event["kind"] in BREAKS for event in told)}
