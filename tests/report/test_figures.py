"""What Prometheus is shown of a record."""

from pathlib import Path

import pytest

from launcher.report.figures import METRICS, Figures
from launcher.report.reading import Reading
from tests.trackers.records import Record, first_try, second_try


def shown(run_dir: Path, figures: Figures, after_s: float = 0.0) -> dict[tuple[str, str, str], float]:
    events = Reading(run_dir / "metrics.jsonl").take()
    for event in events:
        figures.take(event)
    found = figures.read(events[-1]["time"] + after_s)
    assert {figure.name for figure in found} <= set(METRICS)
    return {
        (figure.name.removeprefix("launcher_"), figure.stage, figure.metric): figure.value for figure in found
    }


def test_a_try_with_a_failure(tmp_path: Path) -> None:
    first_try(tmp_path)
    figures = Figures()
    found = shown(tmp_path, figures, after_s=7)
    of_stage = {name: value for (name, stage, metric), value in found.items() if stage == "chat"}
    assert of_stage["step"] == 6 and of_stage["num_steps"] == 12 and of_stage["saved_step"] == 4
    assert of_stage["tokens"] == 600 and of_stage["samples"] == 48
    assert of_stage["tokens_per_second"] == 200 and of_stage["padding_share"] == pytest.approx(0.2)
    assert of_stage["mfu_share"] == pytest.approx(0.4)
    assert of_stage["data_wait_share"] == pytest.approx(0.02)
    assert of_stage["failures"] == 1 and of_stage["restarts"] == 0 and of_stage["workers"] == 2
    assert 7 <= of_stage["checkpoint_age_seconds"] < 8
    assert found["eval", "chat", "accuracy"] == 0.25
    again = {figure.name for figure in figures.read(0.0)}
    assert again == set(METRICS) - {"launcher_tokens", "launcher_samples"}, (
        "gauges hold, counters are added to once"
    )


def test_workers_that_go_on_are_a_restart_and_counters_count_what_is_trained_again(tmp_path: Path) -> None:
    first_try(tmp_path)
    second_try(tmp_path)
    found = shown(tmp_path, Figures())
    assert found["restarts", "chat", ""] == 1 and found["failures", "chat", ""] == 1
    assert found["tokens", "chat", ""] == 100 * (6 + 8)
    assert found["step", "chat", ""] == 12


def test_a_stage_that_is_over_shows_only_its_evaluation_and_counts(tmp_path: Path) -> None:
    record = Record(tmp_path)
    record.begin(0, 3, stage="source")
    record.steps(1, 3, stage="source")
    record.write("eval", stage="source", step=3, metrics={"loss": 1.5})
    record.begin(0, 3, stage="target")
    record.steps(1, 1, stage="target")
    found = shown(tmp_path, Figures())
    assert {name for name, stage, _ in found if stage == "source"} == {"eval", "tokens", "samples"}
    assert found["loss", "target", ""] == 2.0 and found["eval", "source", "loss"] == 1.5
    assert found["tokens", "source", ""] == 300 and found["tokens", "target", ""] == 100


def test_a_run_that_stands_still_shows_no_speed(tmp_path: Path) -> None:
    first_try(tmp_path)
    figures = Figures()
    shown(tmp_path, figures)
    of_speed = {"launcher_tokens_per_second", "launcher_mfu_share"}
    read_s = figures.stepped_s
    assert of_speed <= {figure.name for figure in figures.read(read_s + 59)}
    left = {figure.name for figure in figures.read(read_s + 61)}
    assert not left & {*of_speed, "launcher_data_wait_share", "launcher_padding_share"}
    assert "launcher_loss" in left and "launcher_step" in left
