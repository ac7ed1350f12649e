"""Ends of real runs, each with its verdict: in the last lines, in report.json, as the exit code. Real signals."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.runs import Run, chat_recipe

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]


def report(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run.run_dir / "report.json").read_text())
    return found


def last_lines(run: Run) -> list[str]:
    """The verdict in the output: from its first line to its last, without the one that names the page."""
    lines = run.output().splitlines()
    if lines[-1] == f"  report: {run.run_dir / 'report.html'}":
        lines.pop()
    return lines[max(i for i, line in enumerate(lines) if line.startswith("verdict: ")) :]


def test_a_driver_that_is_killed_a_stop_and_a_worker_that_is_lost(
    chat_setup: dict[str, Any], tmp_path: Path
) -> None:
    recipe = chat_recipe(chat_setup, tmp_path / "chat.yaml", steps=2000)
    run = Run(recipe, tmp_path / "runs", "--workers", "2", "--set", "max_failures=0")
    run.start().wait_for_step(5)
    assert report(run)["verdict"]["kind"] == "running"
    run.send(signal.SIGKILL)
    run.end(30)

    # In the output: the driver has to know of it, else it ends at once.
    run.start().wait_until(lambda: "chat  step" in run.output(), "a second try")
    run.send(signal.SIGINT)
    assert run.end(60) == 130, run.output()
    assert "its driver was killed" in run.output()
    told, last = report(run), run.events("step")[-1]["step"]
    assert [each["kind"] for each in told["earlier"]] == ["driver lost"]
    assert told["earlier"][0]["step"] >= 5
    assert told["verdict"]["kind"] == "stopped by the user" and told["verdict"]["cost"]["steps"] == 0
    assert [each["kind"] for each in told["events"]] == ["start", "checkpoint", "left"]
    assert last_lines(run)[0] == "verdict: stopped by the user (exit code 130)"
    assert last_lines(run)[-1] == f"  next: the same command continues from step {last} of stage chat"
    assert (run.run_dir / "report.html").is_file() and "report.html" in run.output().splitlines()[-1]

    run.start().wait_until(lambda: len(run.events("stage_begin")) == 3, "a third try")
    run.wait_until(lambda: run.events("step")[-1]["step"] > last + 1, "a step")
    os.kill(run.events("stage_begin")[-1]["pid"], signal.SIGKILL)
    assert run.end(120) == 4, run.output()
    told = report(run)
    assert [each["kind"] for each in told["earlier"]] == ["driver lost", "stopped by the user"]
    assert told["verdict"]["kind"] == "worker lost", told["verdict"]
    assert told["verdict"]["cost"]["steps"] == run.events("step")[-1]["step"] - last
    assert last_lines(run)[0] == "verdict: worker lost (exit code 4)"
    assert any("rank 0" in line for line in last_lines(run))
    assert f"the same command continues from step {last} of stage chat" in last_lines(run)[-1]


def test_bad_input_and_a_bug_in_a_stage_and_then_a_good_end(
    chat_setup: dict[str, Any], tmp_path: Path
) -> None:
    data = {"train": str(chat_setup["train"]), "eval_fraction": 0.2}
    recipe = chat_recipe(chat_setup, tmp_path / "chat.yaml", steps=12, data=data)
    run = Run(recipe, tmp_path / "runs", "--workers", "2", "--set", "checkpoint.every_steps=4")
    run.start().wait_for_step(1)
    # What the evaluation at the end wants is gone.
    stores = [path for path in (tmp_path / "runs" / ".store").iterdir() if list(path.glob("**/*.arrow"))]
    store = min(stores, key=lambda path: sum(each.stat().st_size for each in path.glob("**/*.arrow")))
    shutil.move(store, tmp_path / "aside")
    assert run.end(300) == 2, run.output()
    assert last_lines(run)[0] == "verdict: bad input (exit code 2)"
    assert report(run)["verdict"]["cost"]["steps"] == 4
    assert "continues from step 8 of stage chat" in last_lines(run)[-1]
    shutil.move(tmp_path / "aside", store)

    # Nobody thinks of this, so it is no error of a type of its own.
    run.start("--set", "max_failures=0").wait_until(
        lambda: len(run.events("stage_begin")) == 2, "a second try"
    )
    in_the_way = run.run_dir / "stages" / "chat" / "done.json"
    in_the_way.mkdir()
    assert run.end(300) == 4, run.output()
    told = report(run)
    assert told["verdict"]["kind"] == "bug"
    assert last_lines(run)[0] == "verdict: bug (exit code 4)"
    assert "IsADirectoryError" in " ".join(last_lines(run)) and "report it" in last_lines(run)[-1]
    in_the_way.rmdir()

    assert run.start().end(300) == 0, run.output()
    assert run.output().splitlines()[-1].startswith("verdict: done (exit code 0): 12 steps, ")
    told = report(run)
    assert told["verdict"]["kind"] == "done" and told["summary"]["stages"]["chat"]["steps"] == 12
    assert [each["kind"] for each in told["earlier"]] == ["bad input", "bug"]
