"""A batch whose loss is no number, in real runs of the command line: stop, then past it by going back."""

import json
import math
from pathlib import Path

import pytest
import yaml

from tests.runs import Run
from tests.test_ends import last_lines, report
from tests.train.test_numbers import BATCH, regression

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]


def committed(run: Run) -> list[int]:
    """The steps of which there are checkpoints."""
    folder = run.run_dir / "stages" / "only" / "checkpoints"
    return sorted(int(path.parent.name.removeprefix("step-")) for path in folder.glob("*/commit.json"))


def bad_batches(run: Run) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run.run_dir / "bad_batches.jsonl").read_text().splitlines()]


def test_stop_then_rollback_then_a_good_end(tmp_path: Path) -> None:
    tree = regression(tmp_path, 1e38, "fp32")
    # An epoch of three steps: the bad sample comes once, and once again in the fourth to sixth step.
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    run = Run(tmp_path / "recipe.yaml", tmp_path / "runs", "--workers", "2")
    assert run.start().end(300) == 8, run.output()
    told = report(run)["verdict"]
    assert told["kind"] == "numbers" and last_lines(run)[0] == "verdict: numbers (exit code 8)"
    assert "on_nan=skip" in last_lines(run)[-1]
    (bad,) = bad_batches(run)
    step = int(str(bad["step"]))
    assert bad["loss"] == "inf" and len(bad["samples"]["only"]) == BATCH  # type: ignore[index]
    # What came before it is saved, and nothing is lost.
    assert committed(run) == ([step - 1] if step > 1 else [])
    assert told["cost"]["steps"] == 0 and run.last_step() == step - 1

    assert run.start("--set", "on_nan=rollback").end(400) == 0, run.output()
    passed = json.loads((run.run_dir / "skipped.json").read_text())["only"]
    assert passed[0] == step and len(passed) == 2
    assert [each["step"] for each in bad_batches(run)] == [step, *passed]
    assert {event["step"] for event in run.events("skipped")} == set(passed)
    losses = run.losses()
    assert set(losses) | set(passed) == {1, 2, 3, 4, 5, 6} and not set(losses) & set(passed)
    assert all(math.isfinite(loss) for loss in losses.values())
    told = report(run)
    kinds = [each["kind"] for each in told["events"]]
    assert kinds.count("rolled_back") == 2 == kinds.count("restart") == told["verdict"]["cost"]["restarts"]
    assert run.output().splitlines()[-1].startswith("verdict: done (exit code 0): 6 steps")
