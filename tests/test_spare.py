"""Processes that wait for workers: the environment is the same to the letter, else Ray would not take them."""

import contextlib
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher import spare
from tests.runs import Run, chat_recipe


def idle(run_pid: int) -> set[int]:
    """Processes below a run that have made themselves ready for a worker and have no work."""
    found = set()
    for each in psutil.Process(run_pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if each.cmdline()[:1] == ["ray::IDLE"] and each.environ().get(spare.KIND) == "worker":
                found.add(each.pid)
    return found


def workers(run_pid: int) -> set[int]:
    """The processes of the workers."""
    found = set()
    for each in psutil.Process(run_pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "RayTrainWorker" in "".join(each.cmdline()[:1]):
                found.add(each.pid)
    return found


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_workers_start_in_processes_that_were_ready(chat_setup: dict[str, Any], tmp_path: Path) -> None:
    recipe = chat_recipe(chat_setup, tmp_path / "chat.yaml", steps=4000)
    run = Run(recipe, tmp_path / "runs", "--workers", "2", "--set", "checkpoint.every_steps=10").start()
    assert run.process is not None
    pid = run.process.pid
    run.wait_for_step(12)
    # Workers are asked for after this is written: a process that began before was made ready.
    planned_s, first = (run.run_dir / "plan.json").stat().st_mtime, workers(pid)
    assert len(first) == 2
    assert all(psutil.Process(each).create_time() < planned_s for each in first)
    run.wait_until(lambda: len(idle(pid)) == 2, "spares of the workers", 150)
    second = idle(pid)
    psutil.Process(min(first)).kill()
    run.wait_until(lambda: workers(pid) == second, "workers in their place", 120)
    run.wait_for_step(run.last_step() + 2)
    run.process.terminate()
    assert run.end(60) == 130


def test_what_cannot_be_imported_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spare, "WORKER", ("json", "no_such_module_at_all"))
    monkeypatch.setenv(spare.KIND, "worker")
    spare.imports()


def test_a_users_own_hook_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    assert spare.hook() == {"worker_process_setup_hook": "launcher.spare.imports"}
    monkeypatch.setenv(spare.HOOK, "mine.setup")
    assert spare.hook() == {}
