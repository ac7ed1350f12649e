import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from launcher.report import card, past
from launcher.tasks.crf import READ_ME
from tests.report.directories import RECIPE, killed_run, write


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    run_dir = killed_run(tmp_path / "run", monkeypatch)
    (run_dir / "stages/chat/export").mkdir()
    return run_dir


def _card(run_dir: Path, folder: str = "export") -> tuple[dict[str, Any], str]:
    """Front matter and body, as the Hub's own reader sees them."""
    (path,) = [path for path in card.write_all(past.read(run_dir)) if path.parent.name == folder]
    found = ModelCard.load(path)
    return found.data.to_dict(), found.text


def test_the_front_matter_is_the_hubs(run_dir: Path) -> None:
    front, body = _card(run_dir)
    assert front["base_model"] == "org/base"
    assert front["library_name"] == "transformers" and front["pipeline_tag"] == "text-generation"
    (result,) = front["model-index"][0]["results"]
    assert result["dataset"] == {"name": "eval.jsonl", "type": "local"}
    assert {each["type"]: each["value"] for each in result["metrics"]} == {"accuracy": 0.9, "loss": 0.4}
    for words in (
        "from org/base",
        "| training | train.jsonl | 80 | 8,000 | unknown |",
        "| learning rate | 0.001 |",
    ):
        assert words in body, words
    assert "90 of 100" in body and "were not told to the launcher" in body and "One seed" in body


def test_no_private_path_is_told(run_dir: Path) -> None:
    recipe = json.loads(json.dumps(RECIPE))
    recipe["model"] = {"path": "/home/someone/models/base"}
    recipe["stages"][0]["data"]["train"] = ["s3://secret-bucket/deep/train-1.parquet", "hub:org/data"]
    write(run_dir, "recipe.yaml", recipe)
    front, body = _card(run_dir)
    text = json.dumps(front) + body
    assert "someone" not in text and "secret-bucket" not in text and str(run_dir) not in text
    assert "from base" in body and "train-1.parquet" in body
    assert "base_model" not in front and front["datasets"] == ["org/data"]


def test_no_secret_of_an_address_is_told(run_dir: Path) -> None:
    recipe = json.loads(json.dumps(RECIPE))
    recipe["stages"][0]["data"]["train"] = ["https://h/x.csv?sig=hush/hush", "s3://KEY:hush@bucket"]
    write(run_dir, "recipe.yaml", recipe)
    front, body = _card(run_dir)
    assert "hush" not in json.dumps(front) + body and "x.csv" in body


def test_what_a_read_me_says_stays_once(run_dir: Path) -> None:
    path = run_dir / "stages/chat/export/README.md"
    path.write_text(READ_ME, encoding="utf-8")
    card.write_all(past.read(run_dir))
    first = path.read_text(encoding="utf-8")
    card.write_all(past.read(run_dir))
    again = path.read_text(encoding="utf-8")
    assert again == first and first.count(READ_ME.strip()) == 1
    assert first.startswith("---\n") and first.count("\nmodel-index:") == 1


def test_adapters_have_their_card_too(run_dir: Path) -> None:
    (run_dir / "stages/chat/adapter").mkdir()
    front, body = _card(run_dir, "adapter")
    assert front["library_name"] == "peft" and "lora" in front["tags"]
    assert "adapters and the head" in body


def test_a_translation_names_its_languages(run_dir: Path) -> None:
    recipe = json.loads(json.dumps(RECIPE))
    stage = recipe["stages"][0]
    stage["task"], stage["data"]["prefix"] = "translation", "translate English to German: "
    write(run_dir, "recipe.yaml", recipe)
    front, _ = _card(run_dir)
    assert front["language"] == ["en", "de"] and front["pipeline_tag"] == "translation"


def test_a_name_breaks_no_table(run_dir: Path) -> None:
    recipe = json.loads(json.dumps(RECIPE))
    recipe["stages"][0]["data"]["eval"] = "/data/a|b <c>.jsonl"
    write(run_dir, "recipe.yaml", recipe)
    _, body = _card(run_dir)
    assert r"a\|b \<c\>.jsonl" in body
