"""A run directory with a record, as a run writes them, for what reads it."""

from pathlib import Path
from typing import Any

from launcher import recipe as recipes
from launcher import storage
from launcher.report.record import Recorder

SUMMARY = {"stages": {"chat": {"metrics": {"loss": 0.5}, "steps": 6}}, "num_workers": 2, "device": "cpu"}


def begin(run_dir: Path, *trackers: Any) -> recipes.Recipe:
    """Write what a run writes at its begin; return its recipe."""
    tree = {
        "model": {"path": "some/model"},
        "stages": [
            {"name": "chat", "task": "causal-lm", "data": {"train": "x.jsonl"}, "learning_rate": 1e-3}
        ],
        "trackers": list(trackers),
    }
    recipe = recipes.parse(tree)
    storage.write_text(run_dir / "recipe.yaml", recipes.to_yaml(recipe))
    storage.write_json(run_dir / "ds.json", {"zero_optimization": {"stage": 2}})
    return recipe


def end(run_dir: Path, kind: str) -> None:
    """Write how a try ended."""
    storage.write_json(run_dir / "report.json", {"verdict": {"kind": kind}})
    if kind == "done":
        storage.write_json(run_dir / "summary.json", SUMMARY)


class Record:
    """Writes events as rank 0 and the driver do."""

    def __init__(self, run_dir: Path) -> None:
        self.recorder = Recorder(run_dir / "metrics.jsonl")

    def begin(self, start: int, num_steps: int, stage: str = "chat", num_workers: int = 2) -> None:
        self.recorder.write(
            "stage_begin",
            stage=stage,
            start=start,
            num_steps=num_steps,
            num_workers=num_workers,
            pid=1,
            peak_flops=1e12,
            flops_per_token=4e9,
        )

    def steps(self, first: int, last: int, stage: str = "chat") -> None:
        for step in range(first, last + 1):
            self.recorder.write(
                "step",
                stage=stage,
                step=step,
                loss=loss(step),
                gradient_norm=1.0,
                lr=1e-3,
                epoch=step / 10,
                targets=90,
                samples=8,
                tokens=100,
                slots=125,
                data_s=0.01,
                step_s=0.5,
            )

    def write(self, kind: str, **values: Any) -> None:
        self.recorder.write(kind, **values)


def loss(step: int) -> float:
    """What the record says of a step."""
    return 2.0 / step


def first_try(run_dir: Path) -> None:
    """Six steps of twelve, saved after the fourth, and a failure."""
    record = Record(run_dir)
    record.begin(0, 12)
    record.steps(1, 4)
    record.write("eval", stage="chat", step=4, metrics={"loss": 1.5, "accuracy": 0.25})
    record.write("checkpoint", stage="chat", step=4, bytes=1000, stall_s=0.02, save_s=0.3)
    record.steps(5, 6)
    record.write("failure", reason="it was killed", ranks=[1], ends=False)


def second_try(run_dir: Path) -> None:
    """From the checkpoint to the end: steps 5 and 6 are trained once more."""
    record = Record(run_dir)
    record.begin(4, 12)
    record.steps(5, 12)
    record.write("eval", stage="chat", step=12, metrics={"loss": 0.5, "accuracy": 0.75})
    record.write("export", stage="chat", path="x")
