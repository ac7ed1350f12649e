"""A run seen from another shell: by its files alone, while it goes on, when it ends, and when its driver is gone."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from launcher import storage, watch
from tests.conftest import ROOT
from tests.report.events import begin, step
from tests.run_files import make
from tests.runs import Run, chat_recipe
from tests.terminals import in_terminal, without_codes

COMMAND = [sys.executable, "-m", "launcher", "watch"]


def going(root: Path, name: str = "it") -> Path:
    """A run directory that looks as if its driver were this process."""
    run_dir = make(root, name, "running", host="elsewhere", pid=1)
    tell(run_dir, {"kind": "running"}, [])
    now_s = time.time()
    told = [begin(time=now_s - 3), *(step(n, time=now_s - 3 + n) for n in range(1, 4))]
    storage.write_text(run_dir / "metrics.jsonl", "".join(json.dumps(event) + "\n" for event in told))
    return run_dir


def tell(run_dir: Path, verdict: dict[str, Any], events: list[dict[str, Any]]) -> None:
    """Write the report anew, as a driver does while a run goes on."""
    report = {"verdict": verdict, "begun": 1.0, "seconds": 1.0, "earlier": [], "events": events}
    storage.write_json(run_dir / "report.json", report)


def add(run_dir: Path, text: str) -> None:
    with open(run_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(text)


def test_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path, "earlier", "done")
    going(tmp_path)
    assert watch.main(["--once", "--run-root", str(tmp_path)]) == 0, "the one that is going"
    shown = capsys.readouterr().out
    assert shown.startswith("it: running\n  source: now, step 3 of 100\n  target: to come")
    assert "step 3/100  loss 0.3333" in shown and "next checkpoint at step 5 in 0:02" in shown


def test_how_runs_have_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = ["--run-root", str(tmp_path)]
    make(tmp_path, "good", "done")
    assert watch.main([str(tmp_path / "good")]) == 0
    assert "verdict: done (exit code 0)" in capsys.readouterr().out
    make(tmp_path, "bad", "worker lost", message="the workers could not go on")
    assert watch.main(["bad", *root]) == 4
    assert "error: the workers could not go on\nverdict: worker lost (exit code 4)" in capsys.readouterr().out
    make(tmp_path, "gone", "running", host="elsewhere", pid=1)
    assert watch.main(["gone", *root]) == watch.LOST
    assert re.search(r"nothing has come since \d{4}-.*, 240:00:\d\d ago", capsys.readouterr().out)
    assert watch.main(root) == 2
    assert "no run is going in" in capsys.readouterr().err
    assert watch.main(["none", *root]) == 2


def test_a_live_run_is_followed_to_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, seen = going(tmp_path), []
    failure = {"kind": "failure", "time": 5.0, "reason": "rank 1: gone"}

    def go_on() -> None:
        time.sleep(1.0)
        add(run_dir, json.dumps(step(4))[:20])
        time.sleep(0.7)
        add(run_dir, json.dumps(step(4))[20:] + "\n" + json.dumps(failure) + "\n")
        # The same failure, and one that the record does not hold.
        tell(run_dir, {"kind": "running"}, [failure, failure | {"time": 6.0, "reason": "rank 0: gone"}])
        time.sleep(2.5)
        add(run_dir, "".join(json.dumps(event) + "\n" for event in (begin(start=2), step(3))))
        time.sleep(1.0)
        seen.append(capsys.readouterr().out)
        verdict = {"kind": "stopped by the user", "exit_code": 130, "seen": [], "cost": {}, "next": "again"}
        tell(run_dir, verdict, [])

    thread = threading.Thread(target=go_on)
    thread.start()
    code = watch.main(["it", "--run-root", str(tmp_path)])
    thread.join()
    assert code == 130
    lines = seen[0].splitlines()
    assert lines.count("a worker failed (rank 1: gone); going on from the last checkpoint") == 1
    assert lines.count("a worker failed (rank 0: gone); going on from the last checkpoint") == 1
    assert "stage source: 100 steps of 8 samples, continuing after step 2" in lines
    assert "it: stopped (stopped by the user)" in capsys.readouterr().out


def test_a_killed_drivers_run_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    going(tmp_path)
    monkeypatch.setattr("launcher.report.alive.FRESH_S", 3.0)
    monkeypatch.setattr("launcher.report.alive.SHARED_CLOCK_S", 3.0)
    started_s = time.monotonic()
    assert watch.main(["it", "--run-root", str(tmp_path)]) == watch.LOST
    assert 2 < time.monotonic() - started_s < 10


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_panel_in_terminals(tmp_path: Path, columns: int) -> None:
    run_dir = going(tmp_path)

    def end() -> None:
        time.sleep(4)
        verdict = {"kind": "worker lost", "exit_code": 4, "seen": [], "cost": {}, "next": "again"}
        tell(run_dir, verdict, [])

    thread = threading.Thread(target=end)
    thread.start()
    text = in_terminal([*COMMAND, "it", "--run-root", str(tmp_path)], columns=columns, NO_COLOR="1")
    thread.join()
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", text), "NO_COLOR"
    shown = without_codes(text)
    drawn = [line for line in shown if line.startswith(("╭", "│"))]
    assert drawn and all(len(line) == columns - 2 for line in drawn)
    assert any("3/100   3%" in line for line in drawn) and any("next at step 5" in line for line in drawn)
    assert shown[-1] == "exit code 4" and "verdict: worker lost (exit code 4)" in shown


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_real_run_seen_from_another_shell(chat_setup: dict[str, Any], tmp_path: Path) -> None:
    recipe = chat_recipe(chat_setup, tmp_path / "chat.yaml", steps=4000)
    run = Run(recipe, tmp_path / "runs", "--workers", "2", "--set", "checkpoint.every_steps=20")
    run.start().wait_for_step(5)
    root = ["--run-root", str(tmp_path / "runs")]
    once = subprocess.run([*COMMAND, "--once", *root], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert once.returncode == 0 and "  chat: now, step " in once.stdout, once.stdout + once.stderr
    with subprocess.Popen([*COMMAND, "it", *root], cwd=ROOT, stdout=subprocess.PIPE, text=True) as seen:
        run.wait_until(lambda: run.events("usage"), "word of memory")
        os.kill(run.events("stage_begin")[-1]["pid"], signal.SIGKILL)
        run.wait_until(lambda: len(run.events("stage_begin")) == 2, "a restart")
        run.wait_until(
            lambda: run.events("step")[-1]["time"] > run.events("stage_begin")[-1]["time"], "a step"
        )
        time.sleep(15)
        run.send(signal.SIGINT)
        assert run.end(60) == 130
        shown = seen.communicate(timeout=60)[0]
        assert seen.returncode == 130, shown
    assert "chat  step " in shown and "memory of a worker: host " in shown, shown
    assert "a worker failed" in shown and "chat: checkpoint of step " in shown, shown
    assert "it: stopped (stopped by the user)" in shown
    usage, report = run.events("usage")[0], json.loads((run.run_dir / "report.json").read_text())
    assert usage["begun"]["num_nodes"] == 1 and usage["memory"]["host"] > 0
    assert report["verdict"]["kind"] == "stopped by the user"
