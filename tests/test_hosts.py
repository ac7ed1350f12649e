"""Two hosts with addresses of their own, and a third that submits: with the cluster's token, and with another."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import hosts
from tests.conftest import ROOT
from tests.runs import environment

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]
RAY = str(Path(sys.executable).parent / "ray")
ADDRESS = f"http://{hosts.address(1)}:{hosts.DASHBOARD}"


def from_the_third(*command: str, token: str = hosts.TOKEN["RAY_AUTH_TOKEN"], **extra: Any) -> Any:
    """Run a command there with a token."""
    variables = environment(RAY_API_SERVER_ADDRESS=ADDRESS, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)
    return subprocess.run(
        hosts.on(3, command), cwd=ROOT, env=variables | extra, capture_output=True, text=True, timeout=400
    )


def test_a_job_from_a_third_host_trains_across_two(tmp_path: Path) -> None:
    options = ["--ds", "ds_configs/zero3.json", "--workers", "2", "--run-root", str(tmp_path), "--name", "it"]
    options += ["--set", "stages.source.steps=8", "--set", "stages.target.steps=4", "--set", "baseline=false"]
    command = [RAY, "job", "submit", "--working-dir", ".", "--", "python", "launcher/run.py", *options]
    with hosts.hosts(3), hosts.ray_on(1, 2, dashboard=True) as address:
        wrong = from_the_third(*command, token="f" * 32)
        assert wrong.returncode != 0
        assert not (tmp_path / "it").exists()
        told = from_the_third(sys.executable, "launcher/jobs.py", "list", token="f" * 32)
        assert told.returncode == 3 and "does not take the token" in told.stderr
        joins = [sys.executable, "launcher/run.py", "--address", address, *options]
        told = from_the_third(*joins, token="f" * 32)
        assert told.returncode == 3, told.stdout + told.stderr
        assert "does not take the token: export RAY_AUTH_MODE=token" in told.stderr
        assert not (tmp_path / "it").exists()
        job = from_the_third(*command)
        assert job.returncode == 0, job.stdout[-3000:] + job.stderr[-2000:]
    report = json.loads((tmp_path / "it" / "report.json").read_text())
    assert report["verdict"]["kind"] == "done"
    begun = [json.loads(line) for line in (tmp_path / "it" / "metrics.jsonl").read_text().splitlines()]
    assert {e["num_workers"] for e in begun if e["kind"] == "stage_begin"} == {2}
    assert (tmp_path / "it" / "stages" / "target" / "export" / "model.safetensors").exists()
