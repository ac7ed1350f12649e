"""A run that the user stops: saved at the end of a step, and continued there. Real signals."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.runs import Run, chat_recipe
from tests.test_ends import last_lines

pytestmark = pytest.mark.timeout(900)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_has_saved_its_last_step(
    chat_setup: dict[str, Any], tmp_path: Path, number: signal.Signals
) -> None:
    run = Run(
        chat_recipe(chat_setup, tmp_path / "chat.yaml", steps=2000), tmp_path / "runs", "--workers", "2"
    )
    run.start().wait_for_step(5)
    run.send(number)
    assert run.end(60) == 130, run.output()
    last = run.last_step()
    assert f"saved at step {last} of stage chat" in run.output()
    assert "the same command continues" in last_lines(run)[-1]
    if number == signal.SIGTERM:
        return
    run.start().wait_for_step(last + 2)
    begun = run.events("stage_begin")
    assert [event["start"] for event in begun] == [0, last]
    # Twice means now.
    run.send(number)
    run.send(number)
    assert run.end(60) == 130, run.output()
    assert run.last_step() < 2000


def test_a_signal_to_all_of_a_run_lets_it_save(chat_setup: dict[str, Any], tmp_path: Path) -> None:
    recipe = chat_recipe(chat_setup, tmp_path / "chat.yaml", steps=2000)
    run = Run(recipe, tmp_path / "runs", "--workers", "2").start(is_apart=True)
    run.wait_for_step(5)
    assert run.process is not None
    os.killpg(run.process.pid, signal.SIGTERM)
    assert run.end(60) == 130, run.output()
    assert f"saved at step {run.last_step()} of stage chat" in run.output()
