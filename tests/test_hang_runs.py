"""Runs whose workers stop answering: real processes, stopped by real signals."""

import fcntl
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.runs import Run, chat_recipe

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]
STEPS, SAVED_EVERY, HANG_S = 60, 10, 6.0


def hanging(setup: dict[str, Any], folder: Path, name: str, *more: str, steps: int = STEPS) -> Run:
    recipe = chat_recipe(setup, folder / "chat.yaml", steps=steps)
    arguments = ["--workers", "2", "--set", f"checkpoint.every_steps={SAVED_EVERY}"]
    return Run(recipe, folder / name, *arguments, "--set", f"hang_minutes={HANG_S / 60}", *more)


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


def test_a_worker_that_waits_for_its_disk_ends_a_run_that_may_not_fail(
    chat_setup: dict[str, Any], tmp_path: Path
) -> None:
    more = ["--set", "max_failures=0", "--set", "log_samples=true"]
    run = hanging(chat_setup, tmp_path, "stuck", *more, steps=2000)
    # Rank 1 writes its samples into a pipe that nobody empties: after some steps the write does not return.
    pipe = run.run_dir / "logs" / "samples-rank-1.jsonl"
    pipe.parent.mkdir(parents=True)
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 4096)
    try:
        assert run.start().end() == 9, run.output()
    finally:
        os.close(reader)
    (hang,) = run.events("hang")
    begin = "error: the workers hung once without a new step (max_failures: 0): no step for "
    step = run.last_step()
    (last,) = [line for line in run.output().splitlines() if line.startswith(begin)]
    assert "verdict: hang (exit code 9)" in run.output()
    at = f"is behind, in step {step} of stage chat; the others wait in step {step + 1} (stacks: {hang['stacks']})"
    assert "rank 1 on " in last and at in last
    waits = Path(hang["stacks"]).read_text(encoding="utf-8").partition("--- rank 1")[2]
    assert 'record.py"' in waits and "in write" in waits
