"""Seconds until the next step after a node is lost without notice, and after one has come, on a cluster of raylets.

    python benchmarks/elastic.py [--times 3] [--out benchmarks/results/elastic.json]

A head with one CPU and a node with one, a small Llama, ZeRO-3, `--workers 1:2`. The node goes and comes again and
again; between, the run has 45 s to make its spare processes.
"""

import argparse
import json
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import small  # noqa: E402
from recovery import SETTLE_S  # noqa: E402

from tests.runs import Run, add_raylet, own_cluster  # noqa: E402


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found: dict[str, list[float]] = {"a node was lost": [], "a node came": []}
    with tempfile.TemporaryDirectory() as temp, own_cluster() as cluster:
        add_raylet(cluster, 1)
        node = add_raylet(cluster, 1)
        recipe = small.recipe(Path(temp), 100_000)
        settings = ["--workers", "1:2", "--address", cluster.address, "--set", "checkpoint.every_steps=20"]
        run = Run(recipe, Path(temp) / "runs", *settings, ds="zero3.json")
        run.start().wait_for_step(30)
        try:
            for _ in range(options.times):
                time.sleep(SETTLE_S)
                cluster.remove_node(node, allow_graceful=False)
                found["a node was lost"].append(wait_for(run, 1))
                time.sleep(SETTLE_S)
                node = add_raylet(cluster, 1)
                found["a node came"].append(wait_for(run, 2))
        finally:
            run.send(signal.SIGINT)
            run.end()
    for name, seconds in found.items():
        told = ", ".join(f"{each:.1f}" for each in seconds)
        print(f"next step after {name}: {told} s; median {statistics.median(seconds):.1f} s")
    if options.out:
        options.out.write_text(json.dumps({"seconds": found}, indent=1) + "\n")


def wait_for(run: Run, num_workers: int) -> float:
    """Wait for a step that so many workers make; return how long it took."""
    started_s = time.time()

    def is_there() -> bool:
        begun = [e for e in run.events("stage_begin") if e["time"] > started_s]
        there = [e for e in begun if e["num_workers"] == num_workers]
        return bool(there) and run.events("step")[-1]["time"] > there[-1]["time"]

    run.wait_until(is_there, f"step by {num_workers} workers")
    return time.time() - started_s


if __name__ == "__main__":
    main()
