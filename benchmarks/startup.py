"""Seconds from the command to the first step, by part: a run of its own, and a job submitted to a warm cluster.

    python benchmarks/startup.py [--times 5] [--quick] [--out benchmarks/results/startup.json]

Two CPU workers, a small Llama under ZeRO-3, a few steps. Each start has a run of its own, and data that were not
prepared before; the cluster is one node that has run nothing, then one that has run a job before.
"""

import argparse
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import small  # noqa: E402

from tests.conftest import free_port  # noqa: E402
from tests.runs import environment  # noqa: E402

RAY = str(Path(sys.executable).parent / "ray")
BEFORE = "until the driver's process"


def main() -> None:
    """Measure both, print and keep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="each once")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    times = 1 if options.quick else options.times
    with tempfile.TemporaryDirectory() as temp:
        recipe = small.recipe(Path(temp), 5)
        own = [started(Path(temp) / f"own-{i}", recipe, [], environment()) for i in range(times)]
        with warm_cluster() as (command, variables):
            jobs = [started(Path(temp) / f"job-{i}", recipe, command, variables) for i in range(times + 1)]
    found = {
        "a run of its own": own,
        "the first job of a cluster": jobs[:1],
        "a job on a warm cluster": jobs[1:],
    }
    for name, starts in found.items():
        print(f"{name}: first step after {_median([sum(each.values()) for each in starts]):.1f} s")
        for part in starts[0]:
            print(f"  {_median([each[part] for each in starts]):6.2f} s  {part}")
    if options.out:
        options.out.write_text(json.dumps({"seconds": found}, indent=1) + "\n")


def started(folder: Path, recipe: Path, submit: list[str], variables: dict[str, str]) -> dict[str, float]:
    """Make a short run; return its start's parts in order."""
    options = ["--ds", "ds_configs/zero3.json", "--workers", "2", "--run-root", str(folder), "--name", "it"]
    command = [*submit, sys.executable, "launcher/run.py", str(recipe), *options]
    begun_s = time.time()
    result = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{result.stdout[-2000:]}{result.stderr[-2000:]}")
    startup = json.loads((folder / "it" / "report.json").read_text())["startup"]
    return {BEFORE: round(startup["begun"] - begun_s, 3)} | startup["seconds"]


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


def _median(values: list[float]) -> float:
    return statistics.median(values)


if __name__ == "__main__":
    main()
