"""Runs of the command line as a user has them: started, watched through their record, signalled, continued."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT

LIMIT_S = 400.0


def environment(**extra: str) -> dict[str, str]:
    """This process's, without what another cluster or accelerator would mean."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != "DS_ACCELERATOR"}
    return clean | extra


@contextmanager
def own_cluster() -> Iterator[Any]:
    """Yield an empty cluster of raylets, apart from any other; `add_raylet` adds to it."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        # Paths of sockets have to be short; the note of the newest cluster goes there too, not to others'.
        folder = tempfile.mkdtemp(prefix="ray-")
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        # On a machine with other work, a raylet gives up on its own agent before that has begun.
        patch.setenv("RAY_agent_register_timeout_ms", "200000")
        cluster = Cluster()
        try:
            yield cluster
        finally:
            cluster.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


def add_raylet(cluster: Any, num_cpus: int) -> Any:
    """Add a node, the head first; Ray gives one 30 s to begin, which beside other work can be too short."""
    options = {"include_dashboard": False} if cluster.head_node is None else {}
    for is_last in (False, False, True):
        try:
            return cluster.add_node(
                num_cpus=num_cpus, object_store_memory=80 << 20, dashboard_agent_listen_port=None, **options
            )
        except Exception:
            if is_last:
                raise
    raise AssertionError


class Run:
    """One run directory, and the command that makes it."""

    def __init__(
        self, recipe: Path, runs: Path, *arguments: str, ds: str = "zero2.json", **extra: str
    ) -> None:
        self.run_dir = runs / "it"
        command = [sys.executable, "launcher/run.py", str(recipe), "--ds", f"ds_configs/{ds}"]
        self.command = [*command, "--run-root", str(runs), "--name", "it", *arguments]
        self.extra = extra
        self.process: subprocess.Popen[str] | None = None
        self.log = runs.parent / f"{runs.name}.log"

    def start(self, *more: str, is_apart: bool = False) -> "Run":
        """Start it in the background, and if wanted in a process group of its own."""
        self.run_dir.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [*self.command, *more],
                cwd=ROOT,
                env=environment(**self.extra),
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                process_group=0 if is_apart else None,
            )
        return self

    def end(self, limit_s: float = LIMIT_S) -> int:
        """Wait for its end; return the exit code."""
        assert self.process is not None
        try:
            return self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"no end within {limit_s:g} s: {self.output()[-3000:]}") from None

    def output(self) -> str:
        """What it printed so far."""
        return self.log.read_text(encoding="utf-8")

    def send(self, number: signal.Signals) -> None:
        """Send the driver a signal."""
        assert self.process is not None
        self.process.send_signal(number)

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        """Return the record so far, of these kinds."""
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        events = [json.loads(line) for line in lines if line.endswith("}")]
        return [event for event in events if not kinds or event["kind"] in kinds]

    def last_step(self) -> int:
        """Return the step that was made last."""
        return max((event["step"] for event in self.events("step")), default=0)

    def wait_for_step(self, step: int, limit_s: float = LIMIT_S) -> None:
        """Wait until a step is made."""
        self.wait_until(lambda: self.last_step() >= step, f"step {step}", limit_s)

    def wait_until(self, holds: Any, what: str, limit_s: float = LIMIT_S) -> None:
        """Wait until something holds while the run goes on."""
        assert self.process is not None
        until_s = time.monotonic() + limit_s
        while not holds():
            code = self.process.poll()
            assert code is None, f"ended with {code} before {what}: {self.output()[-3000:]}"
            assert time.monotonic() < until_s, f"no {what} within {limit_s:g} s: {self.output()[-3000:]}"
            time.sleep(0.05)

    def wait_gone(self, limit_s: float = 60) -> None:
        """Wait until no worker of an ended driver writes to the record any more."""
        until_s, seen = time.monotonic() + limit_s, -1
        while (now := len(self.events())) != seen and time.monotonic() < until_s:
            seen = now
            time.sleep(2)

    def losses(self) -> dict[int, float]:
        """Return the loss of every step, as it was made last."""
        return {event["step"]: event["loss"] for event in self.events("step")}


def chat_recipe(setup: dict[str, Any], path: Path, *, steps: int, **stage: Any) -> Path:
    """Write a recipe on the chat data of conftest whose steps take some tenths of a second."""
    tree = {
        "model": {"config": setup["config"], "tokenizer": str(setup["tokenizer"]), "dtype": "fp32"},
        "checkpoint": {"every_steps": 1000},
        "stages": [
            {
                "name": "chat",
                "task": "causal-lm",
                "data": {"train": str(setup["train"])},
                "steps": steps,
                "global_batch": 8,
                "micro_batch": 2,
                "learning_rate": 1e-3,
                "max_length": 256,
                **stage,
            }
        ],
    }
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path
