"""Real runs, one of which loses a worker, and what is written of them afterwards."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from launcher import compare
from launcher.errors import ExportFailed
from launcher.recipe import dump_stage, parse
from launcher.report import past
from launcher.verify import verify_stage
from tests.report.parsed import Parsed
from tests.runs import Run, chat_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def seeds(chat_setup: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two seeds of one recipe; a worker of the first is killed after step 8 is saved, and some more are made."""
    folder = tmp_path_factory.mktemp("seeds")
    data = {"train": str(chat_setup["train"]), "eval": str(chat_setup["train"])}
    recipe = chat_recipe(chat_setup, folder / "chat.yaml", steps=16, data=data, eval_every=8)
    saving = ["--set", "checkpoint.every_steps=8", "--workers", "2", "--seeds", "2"]
    run = Run(recipe, folder / "runs", *saving).start()
    parent = run.run_dir.with_name("it-seeds")
    run.run_dir = parent / "seed-0"
    run.wait_until(lambda: any(e["step"] == 8 for e in run.events("checkpoint")), "a checkpoint")
    run.wait_for_step(9)
    os.kill(run.events("stage_begin")[-1]["pid"], signal.SIGKILL)
    assert run.process is not None
    assert run.process.wait(timeout=400) == 0, run.output()[-3000:]
    yield parent


def test_the_report_says_that_a_worker_was_lost_and_what_that_cost(seeds: Path) -> None:
    run_dir = seeds / "seed-0"
    told = Parsed((run_dir / "report.html").read_text(encoding="utf-8"))
    assert "Left out" not in told.text
    assert "failed: The actor is dead because its worker process has died" in told.text
    record = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [event for event in record if event["kind"] == "step"]
    numbers = [event["step"] for event in steps]
    lost = [event for i, event in enumerate(steps) if event["step"] in numbers[i + 1 :]]
    assert lost and f"{len(lost)} step" in told.text
    lines = dict(told.seconds())
    whole = lines.pop(None)
    assert sum(lines.values()) == pytest.approx(whole, abs=0.001 * len(lines))
    assert lines["lost"] == pytest.approx(sum(event["step_s"] for event in lost), abs=0.1)
    assert lines["restart"] > 1 and lines["steps"] > 0 and lines["evaluation"] > 0 and lines["export"] > 0
    report = json.loads((run_dir / "report.json").read_text())
    assert whole == pytest.approx(report["ended"] - report["begun"], abs=0.01)
    assert report["environment"]["versions"]["torch"] in told.text


def test_several_seeds_have_a_page_of_their_own(seeds: Path) -> None:
    told = Parsed((seeds / "report.html").read_text(encoding="utf-8"))
    assert told.sections == ["spread", "figures", "differences", "curves"]
    assert "stages.chat.seed 0 1" in told.text


def test_two_runs_are_compared(seeds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(seeds / "seed-0"), str(seeds / "seed-1")]
    assert compare.main([*runs, "--html", str(tmp_path / "both.html")]) == 0
    said = capsys.readouterr().out
    losses = [past.read(Path(run)).metrics("chat")["loss"] for run in runs]
    assert all(f"{loss:.4f}" in said for loss in losses) and "stages.chat.seed" in said


def test_the_card_says_what_was_measured_and_breaks_nothing(seeds: Path) -> None:
    stage_dir = seeds / "seed-0" / "stages" / "chat"
    found = ModelCard.load(stage_dir / "export" / "README.md")
    metrics = json.loads((stage_dir / "done.json").read_text())["metrics"]
    (result,) = found.data.to_dict()["model-index"][0]["results"]
    assert {each["type"]: each["value"] for each in result["metrics"]} == pytest.approx(metrics)
    assert "train.jsonl | 96 |" in found.text
    assert str(seeds) not in found.content and str(Path.home()) not in found.content
    recipe = parse(yaml.safe_load((seeds / "seed-0" / "recipe.yaml").read_text()))
    verified = verify_stage(dump_stage(recipe.stages[0]), str(stage_dir))
    assert not isinstance(verified, ExportFailed) and verified.difference < 1e-3
    assert verified.metric == "loss"
