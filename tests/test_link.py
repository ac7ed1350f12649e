"""Two hosts in network namespaces, and the link between them cut: while training, shortly and for good."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import hosts
from tests.runs import Run, chat_recipe

pytestmark = [pytest.mark.timeout(900), pytest.mark.chaos]


@pytest.fixture
def cluster() -> Iterator[str]:
    """Ray on both hosts with a CPU each; its address."""
    with hosts.hosts(2), hosts.ray_on(1, 2) as address:
        yield address


def run_of(recipe: Path, runs: Path, *arguments: str) -> Run:
    run = Run(recipe, runs, *arguments, "--set", "checkpoint.every_steps=10", ds="zero3.json", **hosts.TOKEN)
    run.command = hosts.on(1, run.command)
    return run


def test_a_link_that_is_cut(cluster: str, chat_setup: dict[str, Any], tmp_path: Path) -> None:
    recipe = chat_recipe(chat_setup, tmp_path / "chat.yaml", steps=3000)
    run = run_of(recipe, tmp_path / "runs", "--workers", "1:2", "--address", cluster)
    run.start().wait_for_step(15)
    assert run.events("stage_begin")[-1]["num_workers"] == 2
    begun = len(run.events("stage_begin"))
    # For some seconds: the ranks wait for each other, and nothing is lost.
    hosts.set_link(1, "down")
    time.sleep(6)
    hosts.set_link(1, "up")
    before = run.last_step()
    run.wait_for_step(before + 5)
    assert len(run.events("stage_begin")) == begun
    # For good: the run goes on with the host that is left.
    hosts.set_link(1, "down")
    cut_s = time.time()
    run.wait_until(lambda: len(run.events("stage_begin")) > begun, "a start with what is left")
    run.wait_until(lambda: run.events("step")[-1]["time"] > run.events("stage_begin")[-1]["time"], "a step")
    print(f"next step {run.events('step')[-1]['time'] - cut_s:.1f} s after the link was cut for good")
    assert run.events("stage_begin")[-1]["num_workers"] == 1
    run.send(signal.SIGTERM)
    assert run.end(90) == 130, run.output()
    last = min(run.last_step(), 60)
    lone = Run(recipe, tmp_path / "lone", "--workers", "2", ds="zero3.json").start()
    lone.wait_for_step(last)
    lone.send(signal.SIGTERM)
    assert lone.end(90) == 130
    largest = max(abs(run.losses()[i] - lone.losses()[i]) / lone.losses()[i] for i in range(1, last + 1))
    print(f"{last} steps, largest relative difference of losses {largest:.1e}")
    assert largest < 1e-3
