"""Bad input: one clear line, exit code 2, nothing half-written."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from launcher.errors import DataError
from launcher.facts import prepare_all
from launcher.plan.plan import ModelFacts
from launcher.recipe_file import load
from launcher.run import main
from tests.conftest import ROOT, make_tokenizer, sentence, write_jsonl

ZERO3 = str(ROOT / "ds_configs" / "zero3.json")


class Case:
    """A small sound classification recipe, to be spoilt in one place."""

    def __init__(self, folder: Path) -> None:
        draw = random.Random(0)
        rows = [{"text": sentence(draw, 6), "label": ("good", "bad")[i % 2]} for i in range(24)]
        self.folder = folder
        self.rows = rows
        self.train = write_jsonl(folder / "train.jsonl", rows)
        self.eval = write_jsonl(folder / "eval.jsonl", rows[:6])
        make_tokenizer(folder / "model", [row["text"] for row in rows])
        config = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 400}
        config |= {"num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64}
        (folder / "model" / "config.json").write_text(json.dumps(config))
        self.recipe = {
            "model": {"config": "model", "tokenizer": "model"},
            "stages": [
                {
                    "name": "only",
                    "task": "text-classification",
                    "data": {"train": "train.jsonl", "eval": "eval.jsonl"},
                    "global_batch": 8,
                }
            ],
        }
        self.ds = json.loads(Path(ZERO3).read_text())

    @property
    def data(self) -> dict:
        return self.recipe["stages"][0]["data"]

    def write(self) -> list[str]:
        (self.folder / "recipe.yaml").write_text(yaml.safe_dump(self.recipe))
        (self.folder / "ds.json").write_text(json.dumps(self.ds))
        runs = str(self.folder / "runs")
        return [str(self.folder / "recipe.yaml"), "--ds", str(self.folder / "ds.json"), "--run-root", runs]


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def _missing_file(case: Case) -> None:
    case.data["train"] = "nowhere.jsonl"


def _wrong_column(case: Case) -> None:
    case.data["columns"] = {"text": "sentence"}


def _empty(case: Case) -> None:
    case.train.write_text("")


def _corrupt_parquet(case: Case) -> None:
    path = case.folder / "train.parquet"
    pq.write_table(pa.Table.from_pylist(case.rows), path)
    path.write_bytes(path.read_bytes()[:-40])
    case.data["train"] = "train.parquet"


def _misspelt_recipe_key(case: Case) -> None:
    case.recipe["stages"][0]["learning_rat"] = 1e-4


def _misspelt_ds_key(case: Case) -> None:
    case.ds["gradient_cliping"] = 0.3


def _misspelt_zero_key(case: Case) -> None:
    case.ds["zero_optimization"]["overlap_com"] = True


def _batches_contradict(case: Case) -> None:
    case.ds["train_batch_size"] = 64


def _no_weights(case: Case) -> None:
    case.recipe["model"] = {"path": "model"}


def _too_long(case: Case) -> None:
    case.recipe["stages"][0]["max_length"] = 128


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (_missing_file, ["nowhere.jsonl", "no such file"]),
        (_wrong_column, ["sentence", "columns"]),
        (_empty, ["train.jsonl", "no rows"]),
        (_corrupt_parquet, ["train.parquet", "Parquet"]),
        (_misspelt_recipe_key, ["learning_rat ", "learning_rate", "line"]),
        (_misspelt_ds_key, ["gradient_cliping", "gradient_clipping"]),
        (_misspelt_zero_key, ["overlap_com", "overlap_comm"]),
        (_batches_contradict, ["64", "8", "train_batch_size", "global_batch"]),
        (_no_weights, ["model", "no weights"]),
        (_too_long, ["128", "64", "max_length"]),
    ],
)
def test_told_before_a_cluster_starts(
    case: Case, spoil: Callable[[Case], None], told: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(case)
    assert main([*case.write(), "--plan"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert all(word in lines[0] for word in told), lines[0]
    assert not (case.folder / "runs").exists()


def _prepare(case: Case) -> str:
    """What the preparation says."""
    recipe = load(Path(case.write()[0]))
    from launcher import recipe as recipes

    with pytest.raises(DataError) as told:
        prepare_all(recipes.dump(recipe), ModelFacts(max_positions=64), str(case.folder / "store"))
    assert not list((case.folder / "store").glob("*/meta.json"))[1:], "an eval store of bad data was kept"
    assert "\n" not in str(told.value)
    return str(told.value)


def test_a_label_that_only_the_eval_split_has(case: Case) -> None:
    write_jsonl(case.eval, [{"text": "a fine one", "label": "excellent"}])
    message = _prepare(case)
    assert "excellent" in message
    assert "eval.jsonl" in message
    assert "1" in message


def test_invalid_json_names_the_line(case: Case) -> None:
    lines = case.train.read_text().splitlines()
    lines[11] = '{"text": "cut off'
    case.train.write_text("\n".join(lines))
    message = _prepare(case)
    assert "train.jsonl" in message
    assert "line 12" in message


@pytest.mark.parametrize("root", ["/proc/nothing", "/dev/null/x"])
def test_a_run_root_that_cannot_be_written(case: Case, root: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*case.write()[:-1], root]) == 6
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1 and root in told[0] and "--run-root" in told[0]


def test_a_name_in_use_with_another_recipe(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    from launcher import recipe as recipes
    from launcher import storage

    arguments = [*case.write(), "--name", "mine"]
    old = case.folder / "runs" / "mine"
    storage.write_text(old / "recipe.yaml", recipes.to_yaml(load(Path(arguments[0]))))
    storage.write_json(old / "ds.json", case.ds)
    assert main([*arguments, "--set", "stages.0.epochs=7"]) == 2
    told = capsys.readouterr().err
    assert "mine" in told
    assert "7" in told
    assert main([*arguments, "--plan"]) == 0


def test_a_sound_recipe_plans(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*case.write(), "--plan", "--workers", "3"]) == 0
    out = capsys.readouterr().out
    assert "3 CPU workers" in out
    assert "60 steps of 8 = 3 workers x 3 samples x 1 micro-batches (1 slots of weight zero)" in out
    assert [path.name for path in (case.folder / "runs").rglob("*") if path.is_file()] == ["plan.json"]
