"""From SIGKILL of a worker to the next step: the launcher against a plain Ray Train + DeepSpeed loop.

    python benchmarks/recovery.py [--kills 4] [--out benchmarks/results/recovery.json]

Two CPU workers, a small Llama, ZeRO-2, the same model and as many steps between checkpoints. Both run one after the
other, and in each a worker is killed every few steps.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import small  # noqa: E402

STEPS, SAVE_EVERY = 100_000, 10
LIMIT_S = 180.0
SETTLE_S = 45.0
"""Both run so long before each kill: the launcher makes its spare processes half a minute after a start."""


def main() -> None:
    """Measure both, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=["stock", "launcher"])
    options = parser.parse_args()
    found = {}
    for name, start in (("stock", start_stock), ("launcher", start_launcher)):
        if options.only not in (None, name):
            continue
        with tempfile.TemporaryDirectory() as temp:
            found[name] = waits(*start(Path(temp)), options.kills)
        told = ", ".join(f"{each:.1f}" for each in found[name])
        print(f"{name}: {told} s; median {statistics.median(found[name]):.1f} s", flush=True)
    if options.only:
        return
    ratio = statistics.median(found["launcher"]) / statistics.median(found["stock"])
    print(f"launcher / stock: {ratio:.2f}")
    if options.out:
        options.out.write_text(json.dumps({"seconds": found, "ratio": round(ratio, 3)}, indent=1) + "\n")


Steps = Callable[[], list[dict[str, Any]]]


def start_stock(folder: Path) -> tuple[subprocess.Popen[bytes], Steps]:
    """Start the plain loop; return its process, and what returns its steps so far."""
    (folder / "model.json").write_text(json.dumps(small.MODEL))
    script = [sys.executable, str(ROOT / "benchmarks" / "stock_loop.py")]
    command = [*script, str(folder), str(folder / "model.json"), str(STEPS), str(SAVE_EVERY)]
    return _start(command, folder), lambda: _lines(folder / "steps.jsonl")


def start_launcher(folder: Path) -> tuple[subprocess.Popen[bytes], Steps]:
    """Start the launcher on the same model; return its process, and what returns its steps so far."""
    recipe = small.recipe(folder, STEPS)
    command = [
        sys.executable,
        "launcher/run.py",
        str(recipe),
        "--ds",
        "ds_configs/zero2.json",
        "--workers",
        "2",
    ]
    command += ["--run-root", str(folder / "runs"), "--name", "it", "--set", "max_failures=99"]
    command += ["--set", f"checkpoint.every_steps={SAVE_EVERY}"]
    metrics = folder / "runs" / "it" / "metrics.jsonl"

    def steps() -> list[dict[str, Any]]:
        pid, found = 0, []
        for event in _lines(metrics):
            pid = event["pid"] if event["kind"] == "stage_begin" else pid
            if event["kind"] == "step":
                found.append(event | {"pid": pid})
        return found

    return _start(command, folder), steps


def waits(process: subprocess.Popen[bytes], steps: Steps, kills: int) -> list[float]:
    """Kill rank 0 again and again; return the seconds to the next step of each time."""
    found = []
    try:
        _until(process, lambda: len(steps()) > SAVE_EVERY + 2)
        for _ in range(kills):
            made = len(steps())
            _until(process, lambda made=made: len(steps()) > made + SAVE_EVERY + 2)
            time.sleep(SETTLE_S)
            killed_s, pid = time.time(), steps()[-1]["pid"]
            os.kill(pid, signal.SIGKILL)
            _until(process, lambda pid=pid: steps()[-1]["pid"] != pid)
            after = [each["time"] for each in steps() if each["pid"] != pid and each["time"] > killed_s]
            found.append(after[0] - killed_s)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(3)
    return found


def _start(command: list[str], folder: Path) -> subprocess.Popen[bytes]:
    from tests.runs import environment

    log = open(folder / "log", "w")
    variables = environment(RAY_TRAIN_V2_ENABLED="1", PYTHONPATH=str(ROOT / "benchmarks"))
    return subprocess.Popen(command, cwd=ROOT, env=variables, stdout=log, stderr=log)


def _until(process: subprocess.Popen[bytes], holds: Callable[[], bool]) -> None:
    until_s = time.monotonic() + LIMIT_S
    while not holds():
        if process.poll() is not None or time.monotonic() > until_s:
            raise SystemExit(f"{process.args}: ended, or no step within {LIMIT_S:g} s")
        time.sleep(0.05)


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


if __name__ == "__main__":
    main()
