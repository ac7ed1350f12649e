"""What the record of a run adds to its steps: written and not written in turns, within one run, tracker on and off.

    python benchmarks/record.py [--steps 1200] [--quick] [--out benchmarks/results/record.json]

Two CPU workers train a small Llama under ZeRO-2. Rank 0 writes 20 steps into the record and posts them to the driver
as ever, then keeps 20 to itself, and so on: a step that follows a recorded one against a step that follows none. The
second run has all trackers besides. What others do with the record is counted as CPU time of their processes.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402
import small  # noqa: E402

MEASURED = "measured.json"
SKIP = 40
"""Steps at the start that are left out."""
SAMPLE_S = 0.5


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--quick", action="store_true", help="400 steps")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    steps = 400 if options.quick else options.steps
    with tempfile.TemporaryDirectory() as temp:
        recipe = small.recipe(Path(temp), steps)
        database = {"kind": "mlflow", "uri": f"sqlite:///{temp}/mlflow.db"}
        all_three = ["tensorboard", database, {"kind": "wandb", "mode": "offline"}]
        found = {
            "no tracker": measured(recipe, Path(temp) / "none", []),
            "three trackers": measured(recipe, Path(temp) / "three", all_three),
        }
    for name, one in found.items():
        print(f"{name}: {json.dumps(one)}")
    if options.out:
        options.out.write_text(json.dumps({"cpus": os.cpu_count(), **found}, indent=1) + "\n")


def measured(recipe: Path, runs: Path, trackers: list[Any]) -> dict[str, Any]:
    """Make one run; return what its record cost."""
    from launcher import group, run

    group._train = training
    options = ["--ds", str(ROOT / "ds_configs" / "zero2.json"), "--workers", "2", "--device", "cpu"]
    settings = ["--set", "spares=false", "--set", f"trackers={json.dumps(trackers)}"]
    with watched() as cpu:
        code = run.main([str(recipe), *options, *settings, "--run-root", str(runs), "--name", "it"])
    if code:
        raise SystemExit(code)
    each = json.loads((runs / "it" / MEASURED).read_text())
    times_s = [event["time"] for event in events(runs / "it" / "metrics.jsonl") if event["kind"] == "step"]
    return summed(each[SKIP:]) | {"cpu_share_of_the_workers": shares(cpu, times_s[SKIP], times_s[-1])}


def training(job: dict[str, Any]) -> None:
    """What Ray Train calls on every rank: as ever, but for the recorder."""
    # Workers get this function by itself, without the names of this file.
    import json
    import time
    from pathlib import Path
    from typing import Any

    from launcher import worker
    from launcher.report.record import Recorder

    class InTurns(Recorder):
        """Writes 20 steps, then keeps 20 to itself."""

        def __init__(self, path: Path | None, listener: Any = None) -> None:
            super().__init__(path, listener)
            self.kept: list[tuple[bool, float, float]] = []
            self.followed_one, self.path = True, path

        def write(self, kind: str, **values: Any) -> None:
            if kind != "step":
                super().write(kind, **values)
                if kind == "export" and self.path is not None:
                    (self.path.parent / "measured.json").write_text(json.dumps(self.kept))
                return
            is_on, begun_s = values["step"] // 20 % 2 == 0, time.perf_counter()
            if is_on:
                super().write(kind, **values)
            # A step's time begins before the one before it is recorded.
            self.kept.append((self.followed_one, values["step_s"], time.perf_counter() - begun_s))
            self.followed_one = is_on

    worker.Recorder = InTurns  # type: ignore[misc]
    worker.train(job)


def summed(each: list[tuple[bool, float, float]]) -> dict[str, Any]:
    """Return the medians, and the difference between steps after a recorded one and steps after none."""
    step_s = statistics.median(taken for _, taken, _ in each)
    write_s = statistics.median([cost for _, _, cost in each if cost > 5e-6])
    # Turn by turn, so that what changes slowly on the machine is in both.
    turns: list[list[float]] = []
    last = None
    for is_on, taken, _ in each:
        if is_on is not last:
            turns.append([])
            last = is_on
        turns[-1].append(taken)
    medians = [statistics.median(turn) for turn in turns if len(turn) == 20]
    sign = 1 if len(turns[0]) == 20 and each[0][0] else -1
    pairs = [sign * (a - b) / b for a, b in zip(medians[::2], medians[1::2], strict=False)]
    return {
        "steps": len(each),
        "step_ms": round(1000 * step_s, 2),
        "write_us": round(1e6 * write_s, 1),
        "write_share": round(write_s / step_s, 5),
        "in_turns": {
            "share": round(statistics.fmean(pairs), 5),
            "standard_error": round(statistics.stdev(pairs) / len(pairs) ** 0.5, 5),
            "pairs": len(pairs),
        },
    }


@contextmanager
def watched() -> Iterator[dict[str, list[tuple[float, float]]]]:
    """Yield the CPU seconds of the processes that have to do with a run, over time, by what they are."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    ended = threading.Event()

    def look() -> None:
        me = psutil.Process()
        while not ended.wait(SAMPLE_S):
            sums: dict[str, float] = defaultdict(float)
            for process in [me, *me.children(recursive=True)]:
                try:
                    name, spent = _kind(process, me), process.cpu_times()
                except psutil.Error:
                    continue
                sums[name] += spent.user + spent.system
            for name, seconds in sums.items():
                found[name].append((time.time(), seconds))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def _kind(process: psutil.Process, me: psutil.Process) -> str:
    line = " ".join(process.cmdline())
    if process.pid == me.pid:
        return "driver"
    if "launcher.trackers.follow" in line:
        return f"tracker {process.cmdline()[-1]}"
    if "wandb-core" in line or "wandb" in process.name():
        return "tracker wandb: its core"
    if "ray::Bulletin" in line:
        return "bulletin"
    if "RayTrainWorker" in line or "TrainWorker" in line:
        return "workers"
    return "others"


def shares(cpu: dict[str, list[tuple[float, float]]], begin_s: float, end_s: float) -> dict[str, float]:
    """Return the CPU time of each kind of process between two moments, as a share of the workers'."""
    spent = {name: _at(series, end_s) - _at(series, begin_s) for name, series in cpu.items()}
    of = spent.pop("workers")
    return {name: round(seconds / of, 5) for name, seconds in sorted(spent.items())}


def _at(series: list[tuple[float, float]], moment_s: float) -> float:
    return next((value for at_s, value in series if at_s >= moment_s), series[-1][1])


def events(path: Path) -> list[dict[str, Any]]:
    """Return a record."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
