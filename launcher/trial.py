"""A trial of resuming: some steps, a worker killed, then the same and another number of workers; compared step by step."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from launcher import storage
from launcher.driver import Job
from launcher.generation import Generation
from launcher.origin import Origin
from launcher.plan.plan import World
from launcher.recipe import Recipe

FEWEST_STEPS = 4
RESULT = "verify_resume.json"
MOST_APART = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}
"""Relative, between losses that differ by the order of sums alone."""

Train = Callable[[Job, World, Origin | None, "Kill | None"], Any]
"""Makes one run: of a job, in a world, from another run's checkpoint, with a worker killed."""


class Kill:
    """Kills a worker once, when a step is made."""

    def __init__(self, step: int) -> None:
        self.step, self.is_done = step, False

    def __call__(self, generation: Generation) -> None:
        """Look at how far a generation is; kill its last worker when the step is made."""
        steps = [event["step"] for event in generation.events if event["kind"] == "step"]
        if self.is_done or max(steps, default=0) < self.step:
            return
        victim = [event for event in generation.events if event["kind"] == "worker"][-1]
        there = NodeAffinitySchedulingStrategy(victim["node"], soft=False)
        kill = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(_kill)  # type: ignore[call-overload]
        ray.get(kill.remote(victim["pid"]))
        self.is_done = True


@dataclass(frozen=True, slots=True)
class Comparison:
    """One run against the undisturbed one: the largest relative difference of losses, and at which step."""

    name: str
    difference: float
    step: int
    num_steps: int

    def line(self) -> str:
        """Return it in words."""
        if self.difference == 0:
            return f"{self.name}: {self.num_steps} losses, all equal to the last bit"
        return (
            f"{self.name}: {self.num_steps} losses, apart by {self.difference:.1e} at most (step {self.step})"
        )


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def shortened(recipe: Recipe, num_steps: int) -> Recipe:
    """Return the recipe's first stage alone, for so many steps, saved in the middle, without evaluation."""
    stage = recipe.stages[0]
    data = stage.data.model_copy(update={"eval": None})
    changes = {"steps": num_steps, "data": data, "eval_every": None, "select": None}
    checkpoint = recipe.checkpoint.model_copy(update={"every_steps": num_steps // 2, "every_minutes": None})
    return recipe.model_copy(
        update={
            "stages": [stage.model_copy(update=changes)],
            "transfer": "sequential",
            "baseline": False,
            "trackers": (),
            "checkpoint": checkpoint,
        }
    )


def run(job: Job, world: World, other: int | None, num_steps: int, train: Train) -> tuple[list[str], bool]:
    """Make the three runs beside each other below the job's run directory, and compare them.

    Args:
        job: of the trial: its recipe is `shortened`.
        world: of the first two runs.
        other: workers of the third; None: there is no other number to try.
        num_steps: of each.
        train: makes a run.

    Returns:
        What came out, in lines; whether it is as it should be.
    """
    middle, limit = num_steps // 2, MOST_APART[_dtype(job, world)]
    folders = {name: job.run_dir / name for name in ("undisturbed", "killed", "other")}
    train(replace(job, run_dir=folders["undisturbed"]), world, None, None)
    train(replace(job, run_dir=folders["killed"]), world, None, Kill(middle + 1))
    names = {f"a worker killed, {world.num_workers} workers again": folders["killed"]}
    if other is not None:
        stage = job.recipe.stages[0].name
        origin = Origin(folders["killed"], (), stage, middle)
        there = replace(world, num_workers=other)
        train(replace(job, run_dir=folders["other"], workers=(other, other)), there, origin, None)
        names[f"from step {middle} by {other} workers"] = folders["other"]
    wanted = _losses(folders["undisturbed"])
    found = [_compared(name, _losses(folder), wanted) for name, folder in names.items()]
    is_right = all(each.difference <= limit for each in found)
    tree = [{"name": each.name, "difference": each.difference, "step": each.step} for each in found]
    storage.write_json(job.run_dir / RESULT, {"is_right": is_right, "limit": limit, "runs": tree})
    said = "as it should be" if is_right else f"NOT as it should be: more than {limit:g}"
    return [
        *(each.line() for each in found),
        f"resuming is {said} (kept in {job.run_dir / RESULT})",
    ], is_right


def _dtype(job: Job, world: World) -> str:
    if job.recipe.model.dtype != "auto":
        return job.recipe.model.dtype
    return world.half if world.device == "cuda" else "fp32"


def _losses(run_dir: Path) -> dict[int, float]:
    """The loss of each step, as it was made last."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    return {event["step"]: event["loss"] for event in events if event["kind"] == "step"}


def _compared(name: str, found: dict[int, float], wanted: dict[int, float]) -> Comparison:
    apart = {step: abs(loss - wanted[step]) / max(abs(wanted[step]), 1e-12) for step, loss in found.items()}
    worst = max(apart, key=lambda step: apart[step])
    return Comparison(name, apart[worst], worst, len(apart))
