"""Runs whose workers stop answering: real processes, stopped by real signals."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.runs import Run, chat_recipe

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]
STEPS, SAVED_EVERY = 60, 10


def hanging(setup: dict[str, Any], folder: Path, name: str, *, hang_s: float = 6.0) -> Run:
    recipe = chat_recipe(setup, folder / "chat.yaml", steps=STEPS)
    arguments = ["--workers", "2", "--set", f"checkpoint.every_steps={SAVED_EVERY}"]
    return Run(recipe, folder / name, *arguments, "--set", f"hang_minutes={hang_s / 60}")


def worker_of(run: Run, rank: int) -> int:
    """Return the process that this rank has told of last."""
    pids = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(process / "fd" / "1") == str(run.run_dir / "logs" / f"rank-{rank}.log"):
                pids.append(int(process.name))
        except OSError:
            continue
    assert pids, f"no process of rank {rank}"
    return max(pids)


def test_a_stopped_worker_is_named_ended_and_replaced(chat_setup: dict[str, Any], tmp_path: Path) -> None:
    undisturbed = hanging(chat_setup, tmp_path, "calm").start()
    assert undisturbed.end() == 0, undisturbed.output()
    run = hanging(chat_setup, tmp_path, "hurt").start()
    run.wait_for_step(15)
    pid = worker_of(run, 1)
    # A short stop is none of anybody's business.
    os.kill(pid, signal.SIGSTOP)
    time.sleep(3)
    os.kill(pid, signal.SIGCONT)
    run.wait_for_step(run.last_step() + 5)
    assert not (run.run_dir / "hangs").exists()

    os.kill(pid, signal.SIGSTOP)
    stopped_s, at_step = time.monotonic(), run.last_step()
    run.wait_until(lambda: run.events("hang"), "hang")
    named_s = time.monotonic() - stopped_s
    run.wait_until(lambda: len(run.events("stage_begin")) == 2, "second begin")
    run.wait_until(lambda: run.events()[-1]["kind"] == "step", "step after the hang")
    print(f"SIGSTOP to its report {named_s:.1f} s, to the next step {time.monotonic() - stopped_s:.1f} s")
    with pytest.raises(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
    assert run.end() == 0, run.output()

    (hang,) = run.events("hang")
    assert "rank 1 on " in hang["message"] and "its process is stopped" in hang["message"]
    assert hang["step"] in (at_step, at_step + 1) and hang["stage"] == "chat"
    assert hang["message"] in run.output()
    report = Path(hang["stacks"]).read_text(encoding="utf-8")
    assert "all_reduce" in report or "backward" in report  # Where rank 0 waited.
    assert "--- rank 1\ngave no stacks" in report
    begun = run.events("stage_begin")
    # The last one may just be on its way to the disk when the worker stops.
    assert begun[1]["start"] in range(SAVED_EVERY, at_step + 1, SAVED_EVERY)
    assert "a worker failed" not in run.output()
    assert sorted(run.losses()) == list(range(1, STEPS + 1))
    assert run.losses() == undisturbed.losses()


def test_workers_that_always_hang_end_the_run(chat_setup: dict[str, Any], tmp_path: Path) -> None:
    run = hanging(chat_setup, tmp_path, "stuck", hang_s=4.0).start()
    run.wait_for_step(8)
    for number in range(1, 5):
        os.kill(worker_of(run, 0), signal.SIGSTOP)
        run.wait_until(lambda n=number: len(run.events("hang")) == n, f"hang {number}")
        if number < 4:
            run.wait_until(lambda n=number: len(run.events("stage_begin")) == n + 1, "begin")
            run.wait_until(lambda: run.events()[-1].get("step", 0) >= 5, "step 5 again")
    assert run.end(60) == 9, run.output()
    last = run.output().splitlines()[-1]
    assert last.startswith("error: the workers hung 4 times without a new step: no step for ")
    assert "rank 0 on " in last and "in step " in last and str(run.run_dir / "hangs" / "4.txt") in last
