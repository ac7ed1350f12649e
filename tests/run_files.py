"""Run directories made of the files that a run leaves, for commands that read nothing else."""

import json
import os
import time
from pathlib import Path
from typing import Any

import yaml

from launcher import storage
from tests.report.events import begin, step

AGO_S = 10 * 86400.0


def make(
    root: Path, name: str, kind: str, *, steps: int = 3, stores: list[str] | None = None, **verdict: Any
) -> Path:
    """Write a run of two stages whose first one trains; `kind` is its verdict. It looks ten days old."""
    run_dir = root / name
    tree = {"stages": [{"name": "source"}, {"name": "target"}], "checkpoint": {"every_steps": 5}}
    storage.write_text(run_dir / "recipe.yaml", yaml.safe_dump(tree))
    plan = {"cluster": {"price_per_hour": 36.0}, "stages": {"source": {"num_steps": 100, "step_s": 1.0}}}
    storage.write_json(run_dir / "plan.json", plan)
    storage.write_json(run_dir / "stores.json", stores or [])
    told = {"kind": kind, "exit_code": 0 if kind == "done" else 4, "seen": [], "next": "again", "cost": {}}
    begun_s = time.time() - AGO_S
    report = {"begun": begun_s, "seconds": 200.0, "earlier": [{"seconds": 100.0}], "events": []}
    storage.write_json(run_dir / "report.json", report | {"verdict": told | verdict})
    events = [begin(), *(step(n) for n in range(1, steps + 1))]
    storage.write_text(run_dir / "metrics.jsonl", "".join(json.dumps(event) + "\n" for event in events))
    stage = run_dir / "stages" / "source"
    for number in (5, 10):
        checkpoint(stage / "checkpoints" / f"step-{number:08d}")
    storage.write_text(stage / "export" / "model.safetensors", "e" * 500)
    if kind == "done":
        storage.write_json(stage / "done.json", {"metrics": {"f1": 0.75}, "steps": steps})
        stages = {"source": {"metrics": {"f1": 0.75}}, "target": {"metrics": {}}}
        storage.write_json(run_dir / "summary.json", {"stages": stages})
    age(run_dir)
    return run_dir


def checkpoint(folder: Path) -> None:
    """Write what a committed checkpoint looks like: 1,000 bytes beside its record."""
    storage.write_text(folder / "rank-00000.safetensors", "c" * 1000)
    storage.write_text(folder / "commit.json", "{}\n")


def age(path: Path, seconds: float = AGO_S) -> None:
    """Let everything look as old."""
    then = time.time() - seconds
    for each in [path, *path.rglob("*")]:
        os.utime(each, (then, then))


def files(root: Path) -> set[str]:
    """Return all files below a directory."""
    return {str(file.relative_to(root)) for file in root.rglob("*") if file.is_file()}
