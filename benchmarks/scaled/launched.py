"""The launcher itself, with a worker on each of two hosts and a slow link between them."""

import json
import statistics
from pathlib import Path
from typing import Any

import yaml

from benchmarks.scaled import links, work
from tests import hosts
from tests.runs import Run

STEPS, WARM, FREE = 18, 3, 10
"""Steps of the run; those that do not count; up to which the link has no limit."""


def compare(
    folder: Path, jobs: dict[str, work.Job], point: links.Point, known: links.Known
) -> dict[str, Any]:
    """Make a run, and compare its steps with the prediction.

    Args:
        folder: to write to.
        jobs: one; its recipe is run.
        point: of the link.
        known: of this machine.
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
        run.start().wait_for_step(FREE)
        for number in (1, 2):
            hosts.throttle(number, point.bits_per_s)
        code = run.end(300)
    if code:
        raise RuntimeError(f"the run ended with {code}: {run.output()[-3000:]}")
    seconds = [event["step_s"] for event in run.events("step")]
    # The step in which the limit comes is neither.
    without, measured = statistics.median(seconds[WARM:FREE]), statistics.median(seconds[FREE + 1 :])
    lab = links.Lab(folder, jobs)
    # What a step takes without a limit holds its arithmetic and gloo's own time.
    free, _ = lab.predicted(job, links.Point(None, 0.0, 0), known, 0.0)
    pace, _ = lab.predicted(job, point, known, without - free.step_s)
    row = {
        "job": name,
        "mbit_per_s": (point.bits_per_s or 0) / 1e6,
        "without_limit_s": round(without, 4),
        "measured_s": round(measured, 4),
        "predicted_s": round(pace.step_s, 4),
        "ratio": round(pace.step_s / measured, 3),
    }
    print(f"  {row}", flush=True)
    return row
