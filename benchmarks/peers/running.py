"""Runs a contender in processes of its own, and returns what it recorded."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from peers.work import ROOT, Work


def under_torchrun(work: Work, kind: str, stage: int, steps: int, workers: int = 2) -> dict[str, Any]:
    """Run a contender of `loops.py`; return its record."""
    out = Path(work.folder) / "out.json"
    script = str(ROOT / "benchmarks" / "peers" / "loops.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(workers), script]
    _run([*command, str(work.save()), kind, str(stage), str(steps), str(out)], work.device)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def launched(work: Work, kind: str, stage: int, steps: int, workers: int = 2) -> dict[str, Any]:
    """Make the run by the launcher; return its record, with the stage's beginning and its end beside it."""
    runs = Path(work.folder) / "runs"
    command = [
        sys.executable,
        "launcher/run.py",
        work.recipe,
        "--ds",
        f"ds_configs/zero{stage}.json",
        "--fresh",
    ]
    command += ["--workers", str(workers), "--run-root", str(runs), "--name", kind]
    _run([*command, "--device", work.device, "--set", f"stages.it.steps={steps}"], work.device)
    lines = (runs / kind / "metrics.jsonl").read_text().splitlines()
    every = [json.loads(line) for line in lines]
    events = [event for event in every if event["kind"] == "step"]
    ended = [events[0]["time"] - events[0]["step_s"], *(event["time"] for event in events)]
    found = {
        "seconds": [after - before for before, after in itertools.pairwise(ended)],
        "tokens": [event["tokens"] for event in events],
        "samples": [event["samples"] for event in events],
        "slots": [event["slots"] for event in events],
        "data_seconds": [event["data_s"] for event in events],
        "losses": [event["loss"] for event in events],
        "begin": next(event for event in every if event["kind"] == "stage_begin"),
        "done": json.loads((runs / kind / "stages" / "it" / "done.json").read_text()),
    }
    shutil.rmtree(runs / kind)
    return found


def _run(command: list[str], device: str) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    own = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    own |= {"PATH": path, "PYTHONPATH": str(ROOT)}
    if device == "cpu":
        own |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
