"""A real run with trackers that loses a worker: one curve without gaps or doubled steps, in each of them."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.runs import Run, chat_recipe

pytestmark = [pytest.mark.timeout(500), pytest.mark.slow]


def test_a_run_that_loses_a_worker_is_one_curve_in_all_trackers(
    chat_setup: dict[str, Any], tmp_path: Path
) -> None:
    from mlflow import MlflowClient
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    recipe = chat_recipe(chat_setup, tmp_path / "chat.yaml", steps=60)
    settings = ["--set", "checkpoint.every_steps=20", "--set", "spares=false"]
    settings += ["--set", f"trackers=[tensorboard, {{kind: mlflow, uri: '{uri}'}}]"]
    run = Run(recipe, tmp_path / "runs", "--workers", "2", *settings)
    run.start().wait_for_step(30)
    os.kill(run.events("stage_begin")[-1]["pid"], signal.SIGKILL)
    assert run.end() == 0, run.output()
    assert "tracker" not in run.output()

    steps, losses = list(range(1, 61)), run.losses()
    made = [event["step"] for event in run.events("step")]
    assert len(made) > len(steps), "some were trained once more"
    (failure,) = run.events("failure")
    assert failure["ranks"]
    client = MlflowClient(uri)
    (kept,) = client.search_runs([client.get_experiment_by_name("launcher").experiment_id])
    history = sorted(
        client.get_metric_history(kept.info.run_id, "chat/loss"), key=lambda each: each.timestamp
    )
    assert [each.step for each in history] == steps
    assert [each.value for each in history] == pytest.approx([losses[step] for step in steps], rel=1e-5)
    assert kept.info.status == "FINISHED" and kept.data.metrics["chat/failures"] == 1
    assert kept.data.metrics["final.stages.chat.steps"] == 60
    resolved = yaml.safe_load((run.run_dir / "recipe.yaml").read_text())
    assert kept.data.params["stages.chat.learning_rate"] == str(resolved["stages"][0]["learning_rate"])
    board = EventAccumulator(str(run.run_dir / "tensorboard" / "chat"))
    board.Reload()
    assert [each.step for each in board.Scalars("train/loss")] == steps
