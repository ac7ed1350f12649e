"""The launcher itself, with a worker on each of two hosts and a slow link between them."""

import json
import statistics
from pathlib import Path
from typing import Any

import yaml

from benchmarks.scaled import links, work
from tests import hosts
from tests.runs import Run

STEPS, WARM = 14, 4


def compare(
    folder: Path, jobs: dict[str, work.Job], point: links.Point, found: dict[str, Any]
) -> dict[str, Any]:
    """Make a run, and compare its steps with the prediction.

    Args:
        folder: to write to.
        jobs: one; its recipe is run.
        point: of the link.
        found: of `links`: gloo's rate, and the arithmetic of a step.
    """
    (name, job), *_ = jobs.items()
    recipe = folder / "launched.yaml"
    recipe.write_text(yaml.safe_dump(job.tree | {"spares": False}), encoding="utf-8")
    config = folder / "launched.json"
    config.write_text(json.dumps(job.ds))
    with hosts.hosts(2), hosts.ray_on(1, 2) as address:
        run = Run(recipe, folder / "launched", "--workers", "2", "--address", address, **hosts.TOKEN)
        run.command = hosts.on(1, [*run.command, "--ds", str(config), "--set", f"stages.only.steps={STEPS}"])
        run.extra |= {"OMP_NUM_THREADS": "1"}
        run.start().wait_for_step(1)
        for number in (1, 2):
            hosts.throttle(number, point.bits_per_s)
        code = run.end(300)
    if code:
        raise RuntimeError(f"the run ended with {code}: {run.output()[-3000:]}")
    seconds = [event["step_s"] for event in run.events("step")][WARM:]
    compute_s = next(row["compute_s"] for row in found["rows"] if row["job"] == name)
    known = links.Known(compute_s=compute_s, gloo_bytes_s=found["gloo_bytes_s"])
    pace, _ = links.Lab(folder, jobs).predicted(job, point, known)
    measured = statistics.median(seconds)
    row = {
        "job": name,
        "mbit_per_s": (point.bits_per_s or 0) / 1e6,
        "measured_s": round(measured, 4),
        "predicted_s": round(pace.step_s, 4),
        "ratio": round(pace.step_s / measured, 3),
    }
    print(f"  {row}", flush=True)
    return row
