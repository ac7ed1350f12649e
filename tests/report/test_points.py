"""What trackers are told of a record: each thing once, whatever is trained again."""

from pathlib import Path

import pytest

from launcher.report import points
from launcher.report.points import Telling
from launcher.report.reading import Reading
from tests.trackers.records import Record, first_try, second_try


def told(run_dir: Path, telling: Telling) -> list[points.Point]:
    return list(telling.points(Reading(run_dir / "metrics.jsonl").take()))


def test_numbers_of_a_step(tmp_path: Path) -> None:
    record = Record(tmp_path)
    record.begin(0, 3)
    record.steps(1, 1)
    begun, step = told(tmp_path, Telling())
    assert (begun.stage, begun.values, begun.remark) == (
        "chat",
        {"workers": 2.0},
        "2 workers begin after step 0 of 3",
    )
    assert step.step == 1 and step.values == {
        "loss": 2.0,
        "lr": 1e-3,
        "gradient_norm": 1.0,
        "epoch": 0.1,
        "step_s": 0.5,
        "tokens_per_s": 200.0,
        "samples_per_s": 16.0,
        "padding": pytest.approx(0.2),
        "data_wait": 0.02,
        "mfu": pytest.approx(0.4),
    }


def test_steps_that_are_trained_again_are_told_once_and_rise(tmp_path: Path) -> None:
    first_try(tmp_path)
    second_try(tmp_path)
    found = told(tmp_path, Telling())
    assert [point.step for point in found if "loss" in point.values] == list(range(1, 13))
    assert [point.step for point in found if "eval/accuracy" in point.values] == [4, 12]
    assert [point.values["failures"] for point in found if "failures" in point.values] == [1.0]
    assert [point.remark for point in found if point.remark] == [
        "2 workers begin after step 0 of 12",
        "a worker failed: it was killed",
        "2 workers begin after step 4 of 12",
        "model written to x",
    ]
    steps = [point.step for point in found]
    assert steps == sorted(steps)


def test_telling_goes_on_from_its_state_at_any_event(tmp_path: Path) -> None:
    first_try(tmp_path)
    second_try(tmp_path)
    events = Reading(tmp_path / "metrics.jsonl").take()
    whole = list(Telling(3).points(events))
    for i in range(len(events) + 1):
        one = Telling(3)
        before = list(one.points(events[:i]))
        assert before + list(Telling(3, **one.state()).points(events[i:])) == whole


def test_one_step_in_so_many_and_the_first_and_the_last(tmp_path: Path) -> None:
    record = Record(tmp_path)
    record.begin(0, 11)
    record.steps(1, 11)
    found = told(tmp_path, Telling(5))
    assert [point.step for point in found if "loss" in point.values] == [1, 5, 10, 11]


def test_an_evaluation_of_a_joint_stage_is_not_where_training_is(tmp_path: Path) -> None:
    record = Record(tmp_path)
    record.begin(0, 6)
    record.steps(1, 3)
    record.write("eval", stage="source", step=3, metrics={"f1": 0.5})
    record.write("failure", reason="gone", ranks=[1])
    *_, evaluated, failed = told(tmp_path, Telling())
    assert (evaluated.stage, evaluated.step) == ("source", 3)
    assert (failed.stage, failed.step) == ("chat", 3)


def test_what_no_chart_can_show_is_left_out(tmp_path: Path) -> None:
    record = Record(tmp_path)
    record.begin(0, 3)
    record.write("eval", stage="chat", step=2, metrics={"loss": float("nan"), "f1": 0.5, "of": "x"})
    assert told(tmp_path, Telling())[-1].values == {"eval/f1": 0.5}


def test_a_tree_is_flat_by_the_names_of_its_items() -> None:
    tree = {"model": {"path": "m"}, "stages": [{"name": "a", "epochs": 2, "betas": [0.9, 0.99]}]}
    assert points.flat(tree) == {
        "model.path": "m",
        "stages.a.name": "a",
        "stages.a.epochs": 2,
        "stages.a.betas": [0.9, 0.99],
    }
    assert points.final({"stages": {"a": {"loss": 1, "is_x": True, "export": "p"}}}) == {"stages.a.loss": 1.0}


def test_only_whole_lines_are_read_and_a_cut_one_swallows_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    reading = Reading(path)
    assert reading.take() == []
    record = Record(tmp_path)
    record.begin(0, 3)
    with open(path, "a") as file:
        file.write('{"kind": "step", "st')
    assert [event["kind"] for event in reading.take()] == ["stage_begin"]
    assert reading.take() == []
    Record(tmp_path).begin(2, 3)
    (event,) = reading.take()
    assert event["start"] == 2
    assert reading.position == path.stat().st_size


def test_more_than_one_piece_of_a_record_is_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.report.reading.CHUNK_BYTES", 100)
    record = Record(tmp_path)
    record.steps(1, 20)
    (tmp_path / "metrics.jsonl").open("a").write("x" * 350 + "\n" + "y" * 350 + "\n")
    record.steps(21, 22)
    reading, steps = Reading(tmp_path / "metrics.jsonl"), []
    while events := reading.take():
        steps += [event["step"] for event in events]
    assert steps == list(range(1, 23))


def test_a_record_without_flops_has_no_mfu(tmp_path: Path) -> None:
    record = Record(tmp_path)
    record.write("stage_begin", stage="chat", start=0, num_steps=3, num_workers=2, peak_flops=1e12)
    record.steps(1, 1)
    assert "mfu" not in told(tmp_path, Telling())[-1].values
