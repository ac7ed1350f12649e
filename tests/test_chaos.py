"""Faults on purpose: after each, the run ends with the undisturbed run's losses bit for bit, and the same samples.

A few of them are in every test run; `pytest -m chaos` runs all.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.runs import Run, chat_recipe

pytestmark = [pytest.mark.timeout(1800), pytest.mark.slow]
STEPS = 60
# Large enough that saving takes a while: 2 million parameters.
MODEL = {"hidden_size": 256, "intermediate_size": 512}


@pytest.fixture(scope="module")
def recipe(chat_setup: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chaos")
    setup = chat_setup | {"config": chat_setup["config"] | MODEL}
    return chat_recipe(setup, folder / "chat.yaml", steps=STEPS)


def run_of(recipe: Path, runs: Path, *arguments: str, every_steps: int = 2) -> Run:
    settings = ["--set", f"checkpoint.every_steps={every_steps}", "--set", "log_samples=true"]
    return Run(recipe, runs, "--workers", "2", *settings, *arguments)


@pytest.fixture(scope="module")
def undisturbed(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = run_of(recipe, tmp_path_factory.mktemp("undisturbed") / "runs").start()
    assert run.end() == 0, run.output()
    return run


def processes(run: Run, name: str = "") -> Iterator[psutil.Process]:
    """The run's driver and all that came of it, whose title has a name in it."""
    assert run.process is not None
    driver = psutil.Process(run.process.pid)
    for each in [driver, *driver.children(recursive=True)]:
        try:
            if name in " ".join(each.cmdline()) or name in each.name():
                yield each
        except psutil.NoSuchProcess:
            continue


def workers(run: Run) -> list[psutil.Process]:
    return list(processes(run, "RayTrainWorker"))


def samples(run: Run) -> dict[int, Counter[int]]:
    """The samples of each step, as often as the step was made, over all ranks."""
    made: dict[int, Counter[int]] = {}
    for path in (run.run_dir / "logs").glob("samples-rank-*.jsonl"):
        for line in path.read_text().splitlines():
            event = json.loads(line) if line.endswith("}") else {"step": 0, "ids": []}
            made.setdefault(event["step"], Counter()).update(event["ids"])
    made.pop(0, None)
    return made


def assert_same(run: Run, undisturbed: Run) -> None:
    """Nothing is to be seen of the faults in what was trained."""
    assert run.losses() == undisturbed.losses()
    assert sorted(run.losses()) == list(range(1, STEPS + 1))
    # A step that was made again had the same samples, and no others.
    mine, wanted = samples(run), samples(undisturbed)
    assert {step: set(ids) for step, ids in mine.items()} == {step: set(ids) for step, ids in wanted.items()}
    assert_loads(run, undisturbed)


def assert_loads(run: Run, undisturbed: Run) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    one, other = (
        AutoModelForCausalLM.from_pretrained(each.run_dir / "stages" / "chat" / "export")
        for each in (run, undisturbed)
    )
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("times", [2, pytest.param(20, marks=pytest.mark.chaos)])
def test_workers_killed_at_random_steps(recipe: Path, undisturbed: Run, tmp_path: Path, times: int) -> None:
    draw, waits = random.Random(times), []
    run = run_of(recipe, tmp_path / "runs", "--set", "max_failures=25").start()
    run.wait_for_step(2)
    for _ in range(times):
        made = len(run.events("step"))
        run.wait_until(lambda made=made: len(run.events("step")) > made + draw.randint(0, 2), "more steps")
        if run.last_step() >= STEPS - 4:
            break
        begun, killed_s = len(run.events("stage_begin")), time.time()
        draw.choice(workers(run)).kill()
        run.wait_until(lambda begun=begun: len(run.events("stage_begin")) > begun, "a new start")
        run.wait_until(lambda t=killed_s: run.events("step")[-1]["time"] > t + 1, "a step after it")
        waits.append(run.events("step")[-1]["time"] - killed_s)
    assert run.end() == 0, run.output()
    print(f"{len(waits)} workers killed; next step after {min(waits):.1f} to {max(waits):.1f} s")
    assert len(waits) >= min(times, 10)
    assert_same(run, undisturbed)


def test_a_killed_driver(recipe: Path, undisturbed: Run, tmp_path: Path) -> None:
    run = run_of(recipe, tmp_path / "runs", every_steps=5).start()
    run.wait_for_step(12)
    run.send(signal.SIGKILL)
    run.end(30)
    run.wait_gone()
    first = run.last_step()
    assert run.start().end() == 0, run.output()
    start = run.events("stage_begin")[-1]["start"]
    assert 10 <= start <= first
    made = Counter(event["step"] for event in run.events("step"))
    assert made == Counter({step: 2 if start < step <= first else 1 for step in range(1, STEPS + 1)})
    assert_same(run, undisturbed)


@pytest.mark.chaos
@pytest.mark.parametrize("moment", ["save", "commit"])
def test_a_worker_killed_while_it_saves(recipe: Path, undisturbed: Run, tmp_path: Path, moment: str) -> None:
    run = run_of(recipe, tmp_path / "runs", every_steps=10).start()
    run.wait_for_step(12)
    folder = run.run_dir / "stages" / "chat" / "checkpoints" / "step-00000020"
    victims = workers(run)
    until_s = time.monotonic() + 100
    while time.monotonic() < until_s:
        there = [path.name for path in folder.iterdir()] if folder.exists() else []
        # A file under a name of its own is being written; notes of both ranks precede the commit.
        if (moment == "save" and there) or sum(name.endswith(".json") for name in there) >= 1:
            break
    for each in victims:
        each.kill()
    was_committed = (folder / "commit.json").exists()
    assert run.end() == 0, run.output()
    print(f"killed in {moment}; committed all the same: {was_committed}")
    starts = [event["start"] for event in run.events("stage_begin")]
    assert starts == [0, 20 if was_committed else 10]
    assert_same(run, undisturbed)


@pytest.mark.chaos
def test_everything_killed_at_once(recipe: Path, undisturbed: Run, tmp_path: Path) -> None:
    run = run_of(recipe, tmp_path / "runs").start()
    run.wait_for_step(9)
    for each in list(processes(run)):
        if each.is_running():
            each.kill()
    run.end(30)
    time.sleep(2)
    assert run.start().end() == 0, run.output()
    assert "continuing after step" in run.output()
    assert_same(run, undisturbed)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 200 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(folder)], check=False)
    if mounted.returncode:
        pytest.skip("a disk cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


@pytest.mark.chaos
def test_a_disk_that_gets_full(recipe: Path, undisturbed: Run, tmp_path: Path, small_disk: Path) -> None:
    run = run_of(recipe, small_disk / "runs")
    run.log = tmp_path / "log"
    run.start().wait_for_step(9)
    filler = small_disk / "filler"
    free = shutil.disk_usage(small_disk).free
    with open(filler, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, free - 1_000_000))
    assert run.end() == 6, run.output()
    assert "the checkpoint could not be written" in run.output()
    assert "are needed" in run.output() or "No space left" in run.output()
    filler.unlink()
    assert run.start().end() == 0, run.output()
    assert_same(run, undisturbed)


@pytest.mark.chaos
def test_a_stopped_rank_is_only_late(recipe: Path, undisturbed: Run, tmp_path: Path) -> None:
    run = run_of(recipe, tmp_path / "runs").start()
    run.wait_for_step(9)
    victim = workers(run)[-1]
    victim.send_signal(signal.SIGSTOP)
    time.sleep(5)
    victim.send_signal(signal.SIGCONT)
    assert run.end() == 0, run.output()
    assert len(run.events("stage_begin")) == 1
    assert_same(run, undisturbed)
