import json
import shutil
from pathlib import Path

import pytest

from launcher import compare
from launcher.report import comparison, past
from tests.report.directories import RECIPE, killed_run, write
from tests.report.parsed import Parsed


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two runs: the second learns more slowly, in another ds config, and has one stage more."""
    first = killed_run(tmp_path / "one" / "it", monkeypatch)
    second = tmp_path / "two" / "it"
    shutil.copytree(first, second)
    recipe = json.loads(json.dumps(RECIPE))
    recipe["stages"][0]["learning_rate"] = 2e-4
    recipe["stages"].append({**recipe["stages"][0], "name": "more"})
    write(second, "recipe.yaml", recipe)
    write(second, "ds.json", {"zero_optimization": {"stage": 3, "overlap_comm": True}})
    done = json.loads((second / "stages/chat/done.json").read_text())
    write(second, "stages/chat/done.json", done | {"metrics": {"accuracy": 0.7, "loss": 0.6}})
    return [first, second]


def test_only_what_differs_is_told_key_by_key(two: list[Path]) -> None:
    found = comparison.compare([past.read(each) for each in two])
    assert found.names == ["one/it", "two/it"]
    differences = {each.title: dict(each.rows) for each in found.differences}
    assert differences["recipe"] == {
        "stages.chat.learning_rate": ["0.001", "0.0002"],
        "stages.more": ["-", "is there"],
    }
    assert differences["ds config"] == {
        "zero_optimization.stage": ["2", "3"],
        "zero_optimization.overlap_comm": ["-", "true"],
    }
    tables = {each.title: dict(each.rows) for each in found.tables}
    assert tables["stage chat"]["accuracy"] == ["0.9000", "0.7000"]
    assert tables["stage chat"]["tokens"] == ["16,000", "16,000"]
    assert tables["the whole run"]["steps trained again"] == ["3", "3"]


def test_the_command_prints_tables_and_writes_a_page(
    two: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "out" / "page.html"
    assert compare.main([*map(str, two), "--html", str(page)]) == 0
    said = capsys.readouterr().out
    assert "0.9000" in said and "stages.chat.learning_rate" in said and str(page) in said
    told = Parsed(page.read_text(encoding="utf-8"))
    assert told.sections == ["figures", "differences", "curves"]
    assert "one/it" in told.text and "stages.chat.learning_rate 0.001 0.0002" in told.text
    names = [tag for tag, attributes in told.tags if tag == "svg"]
    assert len(names) >= 5


def test_of_one_run_the_page_is_its_report(two: list[Path], tmp_path: Path) -> None:
    assert compare.main([str(two[0]), "--html", str(tmp_path / "again.html")]) == 0
    told = Parsed((tmp_path / "again.html").read_text(encoding="utf-8"))
    assert "ledger" in told.sections and "worker died" in told.text


def test_a_run_of_several_seeds_is_compared_with_itself(two: list[Path], tmp_path: Path) -> None:
    seeds = tmp_path / "seeds"
    for number, run_dir in enumerate(two):
        shutil.copytree(run_dir, seeds / f"seed-{number}")
    # One moved aside by --fresh, and one of a time when more seeds were asked for.
    shutil.copytree(two[0], seeds / "seed-0.old-1")
    shutil.copytree(two[0], seeds / "seed-2")
    values = {"mean": 0.8, "stdev": 0.1414, "values": [0.9, 0.7]}
    together = {"num_seeds": 2, "stages": {"chat": {"metrics": {"accuracy": values}, "after": {}}}}
    write(seeds, "summary.json", together)
    told = Parsed(comparison.write_seeds(seeds).read_text(encoding="utf-8"))
    assert told.sections == ["spread", "figures", "differences", "curves"]
    assert "chat accuracy 0.8000 0.1414 0.9000 0.7000" in told.text
    assert "seed-0" in told.text and "seed-1" in told.text
    assert "old-1" not in told.text and "seed-2" not in told.text


def test_what_is_no_run_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main([str(tmp_path / "nowhere")]) == 2
    assert compare.main([str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all("give the director" in line for line in lines)


def test_a_page_that_cannot_be_written_is_said(two: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main([str(two[0]), "--html", str(two[0] / "recipe.yaml" / "page.html")]) != 0
    assert "--html" in capsys.readouterr().err
