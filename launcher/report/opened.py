"""What a run directory says beforehand: its stages, what is forecast for them, when to save; as an event for a view."""

import re
from pathlib import Path
from typing import Any

import yaml

from launcher import storage
from launcher.plan.plan import DEFAULT_SAVE_MINUTES
from launcher.report.record import Event

BASELINE = "baseline"
_SEED = re.compile(r"seed-\d+")


def event(run_dir: Path) -> Event:
    """Return the `run` event of a run directory; what is not there yet is left out."""
    asked = recipe(run_dir)[1]
    forecasts = (storage.read_json(run_dir / "plan.json") or {}).get("stages") or {}
    checkpoint = asked.get("checkpoint") or {}
    steps, minutes = checkpoint.get("every_steps"), checkpoint.get("every_minutes")
    if steps is None and minutes is None:
        minutes = DEFAULT_SAVE_MINUTES
    return {
        "kind": "run",
        "said": "the workers start",
        "name": run_dir.name,
        "stages": [_stage(run_dir, name, forecasts.get(name) or {}) for name in names(asked)],
        "save_steps": steps,
        "save_minutes": minutes,
    }


def names(asked: dict[str, Any]) -> list[str]:
    """Return the stages that train one after another, by a recipe's tree."""
    found = [str(stage.get("name")) for stage in asked.get("stages") or []]
    if asked.get("transfer") == "joint":
        found = found[-1:]
    return [*found, BASELINE] if asked.get("baseline") else found


def seeds(run_dir: Path) -> list[Path]:
    """Return the runs of a directory that was made with several seeds, in their order; none that was moved aside."""
    found = [path for path in run_dir.glob("seed-*") if _SEED.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def done(run_dir: Path, name: str) -> dict[str, Any] | None:
    """Return what a stage's `done.json` says; None: it is not done."""
    found = storage.read_json(run_dir / "stages" / name / "done.json")
    return found if isinstance(found, dict) else None


def _stage(run_dir: Path, name: str, forecast: dict[str, Any]) -> dict[str, Any]:
    ended = done(run_dir, name)
    return {
        "name": name,
        "num_steps": (ended or {}).get("steps") or forecast.get("num_steps") or 0,
        "is_done": ended is not None,
        "forecast_s": forecast.get("step_s"),
        "memory": forecast.get("of_worker") or {},
        "metrics": (ended or {}).get("metrics") or {},
    }


def recipe(run_dir: Path) -> tuple[str, dict[str, Any]]:
    """Return the text of a run's recipe.yaml, and its tree; both empty as far as they cannot be read."""
    try:
        text = (run_dir / "recipe.yaml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return "", {}
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError:
        tree = None
    return text, tree if isinstance(tree, dict) else {}
