"""Seconds from the command to the first step, by part: a run of its own, and a job submitted to a started cluster.

    python benchmarks/startup.py [--times 5] [--quick] [--jobs] [--out benchmarks/results/startup.json]

Two CPU workers, a small Llama under ZeRO-3, a few steps. Each start has a run of its own, and data that were not
prepared before; the cluster is one node that has run nothing, then one that has run a job before. On that one the same
work is also done by the plain script of Ray Train's and DeepSpeed's guides (stock_start.py), in turns with ours.
"""

import argparse
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import small  # noqa: E402

from launcher import recipe_file, survey  # noqa: E402
from launcher.plan import sizes, zero  # noqa: E402
from launcher.plan.plan import World, make_plan  # noqa: E402
from tests.conftest import free_port  # noqa: E402
from tests.runs import environment  # noqa: E402

RAY = str(Path(sys.executable).parent / "ray")
DS, WORKERS = "ds_configs/zero3.json", 2
BEFORE = "until the driver's process"
OURS, STOCK = "a job on a warm cluster", "the plain script as a job on a warm cluster"


def main() -> None:
    """Measure both, print and keep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="each once")
    parser.add_argument("--jobs", action="store_true", help="only jobs on a cluster")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    times = 1 if options.quick else options.times
    with tempfile.TemporaryDirectory() as temp:
        recipe = small.recipe(Path(temp), 5)
        folders = (Path(temp) / f"start-{i}" for i in itertools.count())
        found = {
            "a run of its own": [
                started(next(folders), recipe, [], environment()) for _ in range(0 if options.jobs else times)
            ]
        }
        with warm_cluster() as (command, variables):
            found["the first job of a cluster"] = [started(next(folders), recipe, command, variables)]
            stock(next(folders), recipe, command, variables)  # Its first one, too, is not of those in turns.
            found |= {OURS: [], STOCK: []}
            for _ in range(times):
                found[OURS].append(started(next(folders), recipe, command, variables))
                found[STOCK].append(stock(next(folders), recipe, command, variables))
    totals = {name: [round(sum(each.values()), 2) for each in starts] for name, starts in found.items()}
    for name, starts in found.items():
        if starts:
            told = f"{min(totals[name]):.1f} to {max(totals[name]):.1f}"
            print(f"{name}: first step after {statistics.median(totals[name]):.1f} s ({told})")
            for part in starts[0]:
                print(f"  {statistics.median([each[part] for each in starts]):6.2f} s  {part}")
    ratio = statistics.median(totals[OURS]) / statistics.median(totals[STOCK])
    print(f"ours / the plain script's: {ratio:.2f}")
    if options.out:
        told = {"seconds": found, "totals": totals, "ratio": round(ratio, 3)}
        options.out.write_text(json.dumps(told, indent=1) + "\n")


def started(folder: Path, recipe: Path, submit: list[str], variables: dict[str, str]) -> dict[str, float]:
    """Make a short run; return its start's parts in order."""
    options = ["--ds", DS, "--workers", str(WORKERS), "--run-root", str(folder), "--name", "it"]
    command = [*submit, sys.executable, "launcher/run.py", str(recipe), *options]
    begun_s = time.time()
    _run(command, variables)
    startup = json.loads((folder / "it" / "report.json").read_text())["startup"]
    return {BEFORE: round(startup["begun"] - begun_s, 3)} | startup["seconds"]


def stock(folder: Path, recipe: Path, submit: list[str], variables: dict[str, str]) -> dict[str, float]:
    """Make the same run by the plain script; return its start's parts in order."""
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(_stock_run(recipe)))
    script = str(
        ROOT / "benchmarks" / "stock_start.py"
    )  # What is submitted with a job leaves benchmarks out.
    command = [*submit, sys.executable, script, str(folder), str(folder / "run.json")]
    before_s = time.time()
    _run(command, variables)
    found: dict[str, float] = {}
    for part, ended_s in json.loads((folder / "begun.json").read_text()).items():
        found[part], before_s = round(ended_s - before_s, 3), ended_s
    return found


def _run(command: list[str], variables: dict[str, str]) -> None:
    result = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{result.stdout[-2000:]}{result.stderr[-2000:]}")


def _stock_run(recipe: Path) -> dict[str, Any]:
    """What the plain script is to do: the recipe's model, data and steps, and the ds config as the launcher completes it."""
    asked = recipe_file.load(recipe, [])
    stage, world = asked.stages[0], World(num_workers=WORKERS, device="cpu")
    plan = make_plan(
        asked, zero.load(str(ROOT / DS)), DS, sizes.model_facts(asked.model), survey.stage_facts(asked), world
    )
    return {
        "model": small.MODEL,
        "tokenizer": asked.model.tokenizer,
        "train": stage.data.data_sets("train")[0].path,
        "ds": plan.stages[0].ds,
        "workers": WORKERS,
        "batch": plan.stages[0].micro_batch,
        "max_length": stage.max_length,
        "steps": stage.steps,
    }


@contextmanager
def warm_cluster() -> Iterator[tuple[list[str], dict[str, str]]]:
    """Yield what submits a job to a cluster of one node, and the environment for it."""
    folder, dashboard = Path(tempfile.mkdtemp(prefix="ray-")), free_port()
    path = os.pathsep.join([str(Path(RAY).parent), os.environ["PATH"]])
    variables = environment(RAY_AUTH_MODE="disabled", RAY_TMPDIR=str(folder), PATH=path)
    command = [RAY, "start", "--head", "--block", "--num-cpus=2", f"--port={free_port()}"]
    command += [f"--dashboard-port={dashboard}", f"--temp-dir={folder}"]
    command += [f"--dashboard-agent-listen-port={free_port()}"]
    with open(folder / "log", "wb") as log:
        head = subprocess.Popen(command, env=variables, stdout=log, stderr=log, start_new_session=True)
    try:
        variables["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{dashboard}"
        while subprocess.run([RAY, "job", "list"], env=variables, capture_output=True).returncode:
            if head.poll() is not None:
                raise SystemExit((folder / "log").read_text())
            time.sleep(1)
        yield [RAY, "job", "submit", "--working-dir", ".", "--"], variables
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
