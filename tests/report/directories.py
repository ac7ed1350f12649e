"""Run directories as the launcher leaves them, written by its own recorder: for what reads them afterwards."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher import recipe as recipes
from launcher.report.record import Recorder

T0 = 1_800_000_000.0
RECIPE: dict[str, Any] = {
    "model": {"path": "org/base"},
    "stages": [
        {
            "name": "chat",
            "task": "causal-lm",
            "data": {
                "train": "/home/someone/private/train.jsonl",
                "eval": "/home/someone/private/eval.jsonl",
            },
            "learning_rate": 1e-3,
        }
    ],
}


class Clock:
    """Writes a record whose times are chosen."""

    def __init__(self, path: Path, monkeypatch: Any) -> None:
        self.now_s = T0
        monkeypatch.setattr("launcher.report.record.time.time", lambda: self.now_s)
        self.recorder = Recorder(path)

    def begin(self, stage: str, start: int, num_steps: int, workers: int = 2) -> None:
        """Begin a stage."""
        told = {"host": "node-1", "num_workers": workers, "num_steps": num_steps, "unit": "samples"}
        told |= {"flops_per_token": 1e6, "peak_flops": 1e9}
        self.recorder.write("stage_begin", stage=stage, start=start, pid=1, units_per_step=8, **told)

    def steps(self, stage: str, first: int, last: int, step_s: float = 1.0, data_s: float = 0.1) -> None:
        """Make steps, one after another."""
        for step in range(first, last + 1):
            self.now_s += step_s
            spent = {"samples": 8, "tokens": 800, "slots": 1000, "data_s": data_s, "step_s": step_s}
            values = {"loss": 2.0 / step, "gradient_norm": 0.5, "lr": 1e-3 / step, "epoch": 0, "targets": 700}
            self.recorder.write("step", stage=stage, step=step, **values, **spent)

    def evaluate(self, stage: str, step: int, seconds: float, **metrics: float) -> None:
        """Evaluate."""
        self.now_s += seconds
        self.recorder.write("eval", stage=stage, step=step, metrics=metrics)

    def checkpoint(self, stage: str, step: int, seconds: float = 0.0) -> None:
        """Save, while training stands still."""
        self.now_s += seconds
        told = {"bytes": 1 << 20, "stall_s": seconds, "save_s": 2 * seconds}
        self.recorder.write("checkpoint", stage=stage, step=step, **told)

    def wait(self, seconds: float) -> None:
        """Let time go by."""
        self.now_s += seconds


def killed_run(folder: Path, monkeypatch: Any) -> Path:
    """A run of 20 steps that saved at 5 and 15, lost a worker at 8, and ended well; every second is planned.

    10 s until the workers are there, 2 s for the model; a first step of 4 s, all others 1 s.
    """
    folder.mkdir(parents=True)
    clock = Clock(folder / "metrics.jsonl", monkeypatch)
    clock.wait(12)
    clock.begin("chat", 0, 20)
    clock.steps("chat", 1, 1, step_s=4.0)
    clock.steps("chat", 2, 5)
    clock.checkpoint("chat", 5, 0.5)
    clock.steps("chat", 6, 8)
    failed_s = clock.now_s + 1
    clock.wait(9)
    clock.begin("chat", 5, 20)
    clock.steps("chat", 6, 10)
    clock.evaluate("chat", 10, 3.0, loss=0.5, accuracy=0.8)
    clock.steps("chat", 11, 15)
    clock.checkpoint("chat", 15, 0.25)
    clock.steps("chat", 16, 20)
    clock.evaluate("chat", 20, 3.0, loss=0.4, accuracy=0.9)
    clock.wait(2)
    export = folder / "stages" / "chat" / "export"
    clock.recorder.write("export", stage="chat", path=str(export))
    clock.wait(5)
    events = [
        {"kind": "start", "time": T0, "num_workers": 2},
        {"kind": "failure", "time": failed_s, "reason": "worker died <b>badly</b>", "ranks": [1]},
        {"kind": "restart", "time": failed_s + 9, "seconds": 10.0, "stage": "chat", "from": 5},
    ]
    startup = {
        "begun": T0,
        "seconds": {"joining the cluster": 3.0, "preparing the data": 4.0, "starting workers": 3.0},
    }
    report = {
        "verdict": {
            "kind": "done",
            "exit_code": 0,
            "seen": [],
            "cost": {"restarts": 1, "restart_s": 10.0, "again": 3},
        },
        "begun": T0 + 7,
        "ended": clock.now_s,
        "seconds": clock.now_s - T0 - 7,
        "startup": startup,
        "events": events,
        "environment": {
            "command": "python launcher/run.py",
            "versions": {"torch": "2.9"},
            "hosts": {"0": "node-1"},
        },
        "earlier": [],
    }
    done = {
        "metrics": {"accuracy": 0.9, "loss": 0.4},
        "steps": 20,
        "samples": 160,
        "memory": {"host": 3 << 30},
    }
    done |= {"num_parameters": 100, "num_trainable": 90, "padding": 0.2, "data_wait": 0.1}
    write(folder, "report.json", report)
    write(folder, "recipe.yaml", RECIPE)
    write(folder, "ds.json", {"zero_optimization": {"stage": 2}})
    write(folder, "stages/chat/done.json", done)
    memory = {"host": {"predicted": 2 << 30, "used": 3 << 30, "ratio": 1.5}}
    summed = {"chat": {**done, "memory": memory, "verified": 0.0}}
    write(folder, "summary.json", {"stages": summed, "num_workers": 2})
    plan = {"num_steps": 20, "step_s": 0.5, "device_bytes": 2 << 30}
    sizes = {"train": {"rows": 80, "tokens": 8000}, "eval": {"rows": 10}}
    write(folder, "plan.json", {"ds": "zero2.json", "stages": {"chat": plan}, "data": {"chat": sizes}})
    return folder


def write(folder: Path, name: str, tree: Mapping[str, Any]) -> None:
    """Write a file of a run directory."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    text = recipes.to_yaml(recipes.parse(tree)) if name == "recipe.yaml" else json.dumps(tree)
    path.write_text(text, encoding="utf-8")
