"""The worked example of docs/adding-a-task.md: taken out of the page, registered, trained, evaluated, asked."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, write_jsonl
from tests.documents import blocks
from tests.runs import environment
from tests.tasks.texts import WORDS, word_tokenizer

PAGE = "docs/adding-a-task.md"
STEPS = 40


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The launcher with the page's task: one file, and one line in `TaskName`."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "launcher", folder / "launcher", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "ds_configs", folder / "ds_configs")
    [code] = [block.text for block in blocks(PAGE) if block.kind == "python"]
    [added] = [block.text for block in blocks(PAGE) if block.kind == "diff"]
    (folder / "launcher" / "tasks" / "pair_ranking.py").write_text(code, encoding="utf-8")
    recipe = folder / "launcher" / "recipe.py"
    text = recipe.read_text(encoding="utf-8")
    before = "".join(line[1:] for line in added.splitlines(keepends=True) if line[0] == " ")
    after = "".join(line[1:] for line in added.splitlines(keepends=True))
    assert text.count(before) == 1
    recipe.write_text(text.replace(before, after), encoding="utf-8")
    return folder


def run(copy: Path, *command: str, said: str = "") -> str:
    """Run a command in the copy, and nowhere else; return what it printed."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=copy,
        env=environment(PYTHONPATH=str(copy)),
        input=said,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_code_is_as_the_project_wants_it(copy: Path) -> None:
    file = copy / "launcher" / "tasks" / "pair_ranking.py"
    for wanted in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *wanted, "--config", str(ROOT / "pyproject.toml"), str(file)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_it_trains_evaluates_and_predicts(copy: Path) -> None:
    praise, blame = (
        ["good film", "a very good film", "a good"],
        ["bad film", "a very bad film", "a bad", "very bad"],
    )
    rows = [{"better": good, "worse": bad} for good in praise for bad in blame] * 10
    write_jsonl(copy / "pairs.jsonl", rows)
    word_tokenizer().save_pretrained(copy / "tokenizer")
    tree = yaml.safe_load(next(block.text for block in blocks(PAGE) if block.kind == "yaml"))
    tree["model"] = {
        "tokenizer": "tokenizer",
        "config": {
            "model_type": "bert",
            "vocab_size": len(WORDS),
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 32,
            "initializer_range": 0.2,
        },
    }
    tree["stages"][0] |= {"steps": STEPS, "global_batch": 12, "learning_rate": 1e-2}
    (copy / "rank.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")

    said = run(copy, "launcher/run.py", "rank.yaml", "--workers", "2", "--name", "rank")
    print(said)
    assert "verdict: done (exit code 0)" in said
    run_dir = copy / "runs" / "rank"
    events = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [event["loss"] for event in events if event["kind"] == "step"]
    assert len(losses) == STEPS and losses[-1] < losses[0] / 2
    metrics = json.loads((run_dir / "stages" / "rank" / "done.json").read_text())["metrics"]
    assert metrics["accuracy"] == 1.0

    # One process, from the export alone, gives what two ranks under ZeRO-3 gave.
    again = dict(line.split()[:2] for line in run(copy, "-m", "launcher.evaluate", "runs/rank").splitlines())
    assert {name: float(value) for name, value in again.items()} == pytest.approx(metrics, rel=1e-5)
    scores = run(copy, "-m", "launcher.predict", "runs/rank", said="a good film\na bad film\n").split()
    assert float(scores[0]) > float(scores[1])
