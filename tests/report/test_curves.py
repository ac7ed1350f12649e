import json
import time
from pathlib import Path

import numpy as np
import pytest

from launcher.report import curves


def test_a_record_is_read_to_its_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"kind": "stage_begin", "time": 1.0, "stage": "a", "start": 0},
        {"kind": "step", "time": 2.0, "stage": "a", "step": 1, "loss": 0.5, "losses": {"x": 0.1, "y": 0.4}},
        {"kind": "step", "time": 3.0, "stage": "b", "step": 1, "loss": float("nan"), "used_bytes": 7},
        {"kind": "eval", "time": 4.0, "stage": "b", "step": 1, "metrics": {}},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "step", "ti')
    record = curves.read(path)
    assert record.stages == ["a", "b"]
    assert record.stage.tolist() == [0, 1] and record.step.tolist() == [1, 1]
    assert record.time.tolist() == [2.0, 3.0]
    assert record.column("loss of y")[0] == 0.4 and np.isnan(record.column("loss of y")[1])
    assert np.isnan(record.column("used_bytes")[0]) and record.column("used_bytes")[1] == 7
    assert [event["kind"] for event in record.events] == ["stage_begin", "eval"]
    assert record.places == [0, 2]
    assert len(curves.read(tmp_path / "nothing").step) == 0


def test_a_thin_curve_keeps_what_it_ranged_over() -> None:
    y = np.sin(np.arange(100_000) / 9000)
    y[77_777], y[3] = 40.0, np.inf
    thin = curves.thinned(np.arange(100_000.0), y)
    assert len(thin.x) == curves.POINTS
    assert thin.x[-1] == 99_999
    assert thin.high.max() == 40.0 and thin.low.min() == pytest.approx(np.nanmin(y), abs=1e-6)
    assert np.all(thin.low <= thin.y) and np.all(thin.y <= thin.high)
    few = curves.thinned(np.arange(3.0), np.array([1.0, 2.0, 4.0]))
    assert few.y.tolist() == [1.0, 2.0, 4.0]


def test_a_running_mean_is_the_mean_around_each() -> None:
    y = np.array([0.0, 3.0, 6.0, 0.0])
    assert curves.smoothed(y, 3).tolist() == [1.5, 3.0, 3.0, 3.0]
    assert curves.smoothed(y, 1) is y


def test_twice_the_steps_take_twice_the_time(tmp_path: Path) -> None:
    def seconds(num_steps: int) -> float:
        path = tmp_path / f"{num_steps}.jsonl"
        step = '{"kind": "step", "time": %d, "stage": "a", "step": %d, "loss": 1.5, "step_s": 0.1}\n'
        path.write_text("".join(step % (i, i) for i in range(num_steps)))
        begun_s = time.process_time()
        assert len(curves.read(path).step) == num_steps
        return time.process_time() - begun_s

    assert seconds(160_000) < 16 * max(seconds(20_000), 0.02)
