"""The recipe: what is refused, how it is told, and the surface that a test freezes."""

from pathlib import Path

import pytest

from launcher import recipe as recipes
from launcher.errors import RecipeError
from launcher.recipe_file import load

BASE = """model: {config: m, tokenizer: m}
stages:
  - name: a
    task: causal-lm
    data: {train: x.jsonl}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(BASE)
    return path


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("stages.0.epochs=x", "stages.0.epochs"),
        ("stages.b.epochs=1", 'no "b"'),
        ("checkpoint.evry_steps=1", 'did you mean "every_steps"'),
        ("modle.path=x", 'did you mean "model"'),
        ("baseline=true", "baseline"),
        ("stages.0.micro_batch=0", "micro_batch is 0"),
        ("stages.0.global_batch=16k", '"16384 tokens"'),
        ("stages.0.global_batch=0 tokens", "global_batch"),
        ("stages.0.data.train=[]", "data.train"),
        ("stages.0.data.train={pth: x}", 'did you mean "path"'),
        ("stages.0.data.train={path: x, part: [0.5, 0.2]}", "0 <= from < to <= 1"),
        ("stages.0.data.train={path: x, weight: 0}", "weight"),
        ("stages.0.data.train={path: x, filters: [[a, like, b]]}", "'not in'"),
        ("stages.0.data.eval_fraction=2", "eval_fraction"),
        ("stages.0.data={train: x, eval: y, eval_fraction: 0.1}", "either eval or eval_fraction"),
        ("stages.0={name: a, task: text-classification, data: {train: x}, batching: packed}", "bucketed"),
        ("nothing", "key=value"),
        ("model.trust_remote_code=other/model", "trust_remote_code"),
        ("trackers=[mlfow]", "'mlflow'"),
        ("trackers=[{kind: mlflow, expriment: x}]", 'did you mean "experiment"'),
        ("trackers=[{kind: mlflow, uri: mlruns}]", "sqlite:///"),
        ("trackers=[{kind: mlflow, uri: 'https://me:word@host/x'}]", "MLFLOW_TRACKING_PASSWORD"),
        ("trackers=[{kind: wandb, mode: of}]", "trackers.0.mode is 'of'"),
    ],
)
def test_refused(file: Path, setting: str, told: str) -> None:
    with pytest.raises(RecipeError) as error:
        load(file, [setting])
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_the_line_is_named(file: Path) -> None:
    file.write_text(BASE + "    learning_rat: 1\n")
    with pytest.raises(RecipeError, match="line 6: stages.0.learning_rat"):
        load(file)


def test_paths_are_relative_to_the_recipe_and_settings_to_here(file: Path) -> None:
    recipe = load(file, ["stages.a.data.eval=y.jsonl"])
    assert recipe.stages[0].data.train[0].path == str(file.parent / "x.jsonl")
    assert recipe.stages[0].data.eval[0].path == str(Path.cwd() / "y.jsonl")


def test_data_sets_in_all_ways_of_writing(file: Path) -> None:
    def train(written: str) -> tuple[recipes.DataSet, ...]:
        return load(file, [f"stages.a.data={{train: {written}}}"]).stages[0].data.train

    here = Path.cwd()
    assert [each.path for each in train("x.jsonl")] == [str(here / "x.jsonl")]
    assert [each.path for each in train("[x.jsonl, s3://b/y]")] == [[str(here / "x.jsonl"), "s3://b/y"]]
    assert [each.path for each in train("hub:org/name")] == ["hub:org/name"]
    (one,) = train("{path: x, config: en, split: dev}")
    assert (one.path, one.config, one.split) == (str(here / "x"), "en", "dev")
    mixed = train("[{path: x, weight: 2}, s3://b/y]")
    assert [(each.path, each.weight) for each in mixed] == [(str(here / "x"), 2.0), ("s3://b/y", 1.0)]


def test_a_fraction_for_evaluation_is_cut_off_train(file: Path) -> None:
    data = load(file, ["stages.a.data.eval_fraction=0.1"]).stages[0].data
    assert [each.part for each in data.data_sets("train")] == [(0.1, 1.0)]
    assert [each.part for each in data.data_sets("eval")] == [(0.0, 0.1)]
    assert load(file).stages[0].data.data_sets("eval") == ()


def test_what_was_written_survives_the_way_to_a_worker(file: Path) -> None:
    recipe = load(file, ["stages.a.learning_rate=5e-5"])
    again = recipes.parse(recipes.dump(recipe))
    assert again == recipe
    assert "learning_rate" in again.stages[0].model_fields_set
    assert "global_batch" not in again.stages[0].model_fields_set


def test_trackers_in_all_ways_of_writing(file: Path) -> None:
    def trackers(written: str) -> tuple[str, ...]:
        return tuple(each.kind for each in load(file, [f"trackers={written}"]).trackers)

    assert trackers("tensorboard") == ("tensorboard",)
    assert trackers("{kind: wandb, mode: offline}") == ("wandb",)
    assert trackers("[tensorboard, {kind: mlflow, uri: https://a.example.com}]") == ("tensorboard", "mlflow")
    assert load(file).trackers == ()
    one = load(file, ["trackers=[{kind: tensorboard, folder: boards}]"])
    assert one.trackers[0].folder == str(Path.cwd() / "boards")
    assert recipes.identity(one) == recipes.identity(load(file)), "a run may go on with other trackers"
    assert recipes.parse(recipes.dump(one)) == one


def test_every_field_is_documented_and_the_surface_is_frozen() -> None:
    sections = (
        recipes.Recipe,
        recipes.Model,
        recipes.Stage,
        recipes.Data,
        recipes.DataSet,
        recipes.Checkpoint,
        recipes.Head,
        recipes.Lora,
        recipes.Trainable,
        recipes.Selection,
        recipes.Generation,
        recipes.Answers,
        recipes.TensorBoard,
        recipes.MLflow,
        recipes.WandB,
    )
    fields = {s.__name__: s.model_fields for s in sections}
    assert all(field.description for own in fields.values() for field in own.values())
    assert {name: len(own) for name, own in fields.items()} == {
        "Recipe": 13,
        "Model": 10,
        "Stage": 25,
        "Data": 13,
        "DataSet": 7,
        "Checkpoint": 3,
        "Head": 4,
        "Lora": 5,
        "Trainable": 5,
        "Selection": 2,
        "Generation": 4,
        "Answers": 3,
        "TensorBoard": 4,
        "MLflow": 5,
        "WandB": 7,
    }
