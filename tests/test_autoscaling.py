"""A job that brings its nodes: Ray's own autoscaler, over raylets of this machine."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.fleet import Fleet, fleet
from tests.runs import chat_recipe

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]
RAY = str(Path(sys.executable).parent / "ray")


@pytest.fixture(scope="module")
def grown() -> Iterator[Fleet]:
    """A cluster without any worker, that may add three nodes of a CPU each."""
    with fleet({"small": {"resources": {"CPU": 1}, "max_workers": 3}}, idle_s=30) as found:
        yield found


def until(holds: Callable[[], Any], what: str, limit_s: float = 240) -> None:
    until_s = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < until_s, f"no {what} within {limit_s:g} s"
        time.sleep(0.5)


def submit(cluster: Fleet, log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    command = [RAY, "job", "submit", "--working-dir", ".", "--", sys.executable, "launcher/run.py"]
    with open(log, "wb") as out:
        return subprocess.Popen(
            [*command, *arguments], cwd=ROOT, env=cluster.environment, stdout=out, stderr=subprocess.STDOUT
        )


def steps(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [event for line in lines if line.endswith("}") and (event := json.loads(line))["kind"] == "step"]


def test_what_never_can_be_is_said_at_once(grown: Fleet, tmp_path: Path) -> None:
    started_s = time.monotonic()
    job = submit(grown, tmp_path / "log", "--workers", "4", "--run-root", str(tmp_path / "runs"))
    assert job.wait(120) == 1
    said = (tmp_path / "log").read_text()
    assert (
        "error: --workers 4: the autoscaler cannot bring 4 CPUs: ask for fewer, or raise its maximum" in said
    )
    assert "exit code 3" in said
    assert time.monotonic() - started_s < 90
    assert not grown.raylets()
    job = submit(
        grown, tmp_path / "log", "--workers", "1", "--device", "gpu", "--run-root", str(tmp_path / "runs")
    )
    assert job.wait(120) == 1
    assert "--workers 1: the autoscaler cannot bring 1 GPUs" in (tmp_path / "log").read_text()
    job = submit(grown, tmp_path / "log", "--run-root", str(tmp_path / "runs"))
    assert job.wait(120) == 1
    assert "the cluster has no CPUs yet; its autoscaler can add them: say how many with --workers" in (
        (tmp_path / "log").read_text()
    )


def test_a_job_brings_its_nodes_has_one_replaced_and_lets_them_go(grown: Fleet, tmp_path: Path) -> None:
    log, run_dir = tmp_path / "log", tmp_path / "runs" / "it"
    settings = [
        "--set",
        "stages.source.steps=120",
        "--set",
        "stages.target.steps=20",
        "--set",
        "baseline=false",
    ]
    settings += ["--set", "checkpoint.every_steps=10", "--ds", "ds_configs/zero3.json"]
    assert not grown.raylets()
    job = submit(
        grown, log, "--workers", "2", "--run-root", str(run_dir.parent), "--name", run_dir.name, *settings
    )
    until(lambda: len(steps(run_dir)) > 30 or job.poll() is not None, "step 30")
    assert job.poll() is None, log.read_text()[-3000:]
    assert len(grown.raylets()) == 2
    # As a spot node goes that gives no notice.
    grown.raylets()[0].kill()
    lost_s, before = time.time(), steps(run_dir)[-1]["step"]
    assert job.wait(500) == 0, log.read_text()[-3000:]
    said = log.read_text()
    assert "0 of 2 CPU workers have a place; the autoscaler" in said
    assert "starting" in said
    again = [event for event in steps(run_dir) if event["time"] > lost_s and event["step"] <= before]
    assert again, "the lost steps were made again"
    assert {event["stage"] for event in steps(run_dir)} == {"source", "target"}
    report = json.loads((run_dir / "report.json").read_text())
    assert report["verdict"]["kind"] == "done", report
    assert (run_dir / "stages" / "target" / "export" / "model.safetensors").exists()
    # What the job asked for is given back: the nodes go.
    until(lambda: not grown.raylets(), "end of the nodes", 120)


@pytest.mark.chaos
def test_an_elastic_run_begins_with_the_fewest_and_has_the_others_brought(
    grown: Fleet, chat_setup: dict[str, Any], tmp_path: Path
) -> None:
    recipe = chat_recipe(chat_setup, tmp_path / "chat.yaml", steps=3000)
    command = [sys.executable, "launcher/run.py", str(recipe), "--ds", "ds_configs/zero3.json"]
    command += ["--workers", "1:2", "--run-root", str(tmp_path / "runs"), "--name", "it"]
    own = grown.environment | {"RAY_ADDRESS": grown.address}
    with open(tmp_path / "log", "wb") as out:
        run = subprocess.Popen(command, cwd=ROOT, env=own, stdout=out, stderr=subprocess.STDOUT)
    metrics = tmp_path / "runs" / "it" / "metrics.jsonl"

    def sizes() -> list[int]:
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        events = [json.loads(line) for line in lines if line.endswith("}")]
        return [event["num_workers"] for event in events if event["kind"] == "stage_begin"]

    until(lambda: sizes()[-1:] == [2] or run.poll() is not None, "growth")
    assert sizes() in ([1, 2], [2]), (tmp_path / "log").read_text()[-3000:]
    run.send_signal(signal.SIGTERM)
    assert run.wait(90) == 130
    until(lambda: not grown.raylets(), "end of the nodes", 120)
