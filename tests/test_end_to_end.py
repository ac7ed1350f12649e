"""The whole way on real components: real Ray clusters, real DeepSpeed, real signals."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from tests.runs import environment

PYTHON = sys.executable
LIMIT_S = 400
pytestmark = pytest.mark.timeout(900)


def _command(runs: Path, *arguments: str, ds: str = "zero3.json") -> list[str]:
    run = [PYTHON, "launcher/run.py", "--ds", f"ds_configs/{ds}", "--run-root", str(runs)]
    return [*run, *arguments]


def _run(command: list[str], **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env=environment(**extra), capture_output=True, text=True, timeout=LIMIT_S
    )


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The README's first command; its output and its run directory."""
    runs = tmp_path_factory.mktemp("quickstart")
    result = _run(_command(runs, "--workers", "2"))
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    (run_dir,) = [path for path in runs.iterdir() if path.name.startswith("quickstart-")]
    return result.stdout, run_dir


def test_quickstart_gains_from_the_source_stage(quickstart: tuple[str, Path]) -> None:
    output, run_dir = quickstart
    stages = json.loads((run_dir / "summary.json").read_text())["stages"]
    gained, alone = stages["target"]["metrics"]["accuracy"], stages["baseline"]["metrics"]["accuracy"]
    assert gained > 0.9
    assert gained > alone + 0.05
    assert f"{gained:.4f}" in output
    assert f"{alone:.4f}" in output
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [event["loss"] for event in steps if event["kind"] == "step" and event["stage"] == "source"]
    assert losses[-1] < losses[0] / 2


def test_the_export_loads_and_predicts_as_evaluated(quickstart: tuple[str, Path], tmp_path: Path) -> None:
    _, run_dir = quickstart
    recipe = yaml.safe_load((run_dir / "recipe.yaml").read_text())
    data = recipe["stages"][-1]["data"]
    rows = [json.loads(line) for line in Path(data["eval"][0]["path"]).read_text().splitlines()]
    text, label = data["columns"].get("text", "text"), data["columns"].get("label", "label")
    lines = tmp_path / "lines.txt"
    lines.write_text("".join(row[text] + "\n" for row in rows))
    result = _run([PYTHON, "-m", "launcher.predict", str(run_dir), "--input", str(lines)])
    assert result.returncode == 0, result.stderr
    answers = [line.split("\t")[0].strip() for line in result.stdout.splitlines()]
    right = sum(answer == row[label] for answer, row in zip(answers, rows, strict=True))
    evaluated = json.loads((run_dir / "summary.json").read_text())["stages"]["target"]["metrics"]["accuracy"]
    assert right / len(rows) == pytest.approx(evaluated, abs=1e-9)


def test_a_finished_run_is_not_trained_again(quickstart: tuple[str, Path]) -> None:
    output, run_dir = quickstart
    before = (run_dir / "metrics.jsonl").read_bytes()
    result = _run(_command(run_dir.parent, "--workers", "2"))
    assert result.returncode == 0
    assert "finished already" in result.stdout
    assert (run_dir / "metrics.jsonl").read_bytes() == before


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def ray_head(tmp_path_factory: pytest.TempPathFactory):
    """A Ray cluster on ports of its own; yields the environment that submits to it."""
    folder = Path("/tmp") / f"ray-test-{os.getpid()}"
    gcs, dashboard = _free_ports(2)
    variables = environment(RAY_AUTH_MODE="disabled")
    command = [str(Path(PYTHON).parent / "ray"), "start", "--head", "--block", f"--port={gcs}"]
    command += [f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", "--num-cpus=3"]
    command += [f"--temp-dir={folder}", "--node-ip-address=127.0.0.1", "--disable-usage-stats"]
    log = open(tmp_path_factory.mktemp("head") / "log", "w")
    head = subprocess.Popen(
        command, env=variables, stdout=log, stderr=log, cwd=folder.parent, start_new_session=True
    )
    address = f"http://127.0.0.1:{dashboard}"
    variables["RAY_API_SERVER_ADDRESS"] = address
    deadline = time.monotonic() + 90
    while subprocess.run([command[0], "job", "list"], env=variables, capture_output=True).returncode:
        assert time.monotonic() < deadline, Path(log.name).read_text()
        time.sleep(1)
    yield variables
    head.send_signal(signal.SIGTERM)
    try:
        head.wait(timeout=30)
    except subprocess.TimeoutExpired:
        os.killpg(head.pid, signal.SIGKILL)


def _submit(variables: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    ray = str(Path(PYTHON).parent / "ray")
    command = [ray, "job", "submit", "--working-dir", ".", "--", PYTHON, "launcher/run.py"]
    return subprocess.run(
        [*command, "--ds", "ds_configs/zero3.json", *arguments],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


def test_a_submitted_job_succeeds_and_streams(ray_head: dict[str, str], tmp_path: Path) -> None:
    short = ["--set", "stages.source.steps=6", "--set", "stages.target.steps=4", "--set", "baseline=false"]
    result = _submit(ray_head, "--run-root", str(tmp_path), "--name", "job", *short)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "step 6/6" in result.stdout or "eval" in result.stdout
    assert (tmp_path / "job" / "stages" / "target" / "export" / "config.json").exists()


def test_a_submitted_job_that_fails_says_why_last(ray_head: dict[str, str], tmp_path: Path) -> None:
    wrong = ["--set", "stages.source.data.train=/nowhere/x.parquet"]
    result = _submit(ray_head, "--run-root", str(tmp_path), "--name", "bad", *wrong)
    assert result.returncode != 0
    said = [line for line in (result.stdout + result.stderr).splitlines() if "error:" in line]
    assert said, result.stdout + result.stderr
    assert "/nowhere/x.parquet: no such file" in said[0]
    assert not (tmp_path / "bad").exists()


def test_a_packed_run_proves_its_packs_and_tells_its_padding(chat_setup: dict, tmp_path: Path) -> None:
    recipe = {
        "model": {
            "config": chat_setup["config"] | {"hidden_size": 128, "vocab_size": 8000},
            "tokenizer": str(chat_setup["tokenizer"]),
        },
        "stages": [
            {
                "name": "chat",
                "task": "causal-lm",
                "data": {"train": str(chat_setup["train"])},
                "steps": 4,
                "global_batch": "2048 tokens",
                "batching": "packed",
                "max_length": 256,
            }
        ],
        "log_samples": True,
    }
    (tmp_path / "packed.yaml").write_text(yaml.safe_dump(recipe))
    result = _run(_command(tmp_path, str(tmp_path / "packed.yaml"), "--workers", "2", "--name", "packed"))
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "a worker failed" not in result.stdout
    assert "4 steps of 8 packs" in result.stdout and "padding" in result.stdout
    steps = [json.loads(line) for line in (tmp_path / "packed" / "metrics.jsonl").read_text().splitlines()]
    steps = [event for event in steps if event["kind"] == "step"]
    assert all(event["samples"] >= 8 and event["slots"] <= 2048 for event in steps)
    assert 1 - sum(e["tokens"] for e in steps) / sum(e["slots"] for e in steps) < 0.1
    done = json.loads((tmp_path / "packed" / "summary.json").read_text())["stages"]["chat"]
    assert done["padding"] < 0.1 and done["data_wait"] < 0.05
