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
        ("nothing", "key=value"),
        ("model.trust_remote_code=other/model", "trust_remote_code"),
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
    assert recipe.stages[0].data.train == str(file.parent / "x.jsonl")
    assert recipe.stages[0].data.eval == str(Path.cwd() / "y.jsonl")


def test_what_was_written_survives_the_way_to_a_worker(file: Path) -> None:
    recipe = load(file, ["stages.a.learning_rate=5e-5"])
    again = recipes.parse(recipes.dump(recipe))
    assert again == recipe
    assert "learning_rate" in again.stages[0].model_fields_set
    assert "global_batch" not in again.stages[0].model_fields_set


def test_every_field_is_documented_and_the_surface_is_frozen() -> None:
    sections = (recipes.Recipe, recipes.Model, recipes.Stage, recipes.Data, recipes.Checkpoint)
    fields = {s.__name__: s.model_fields for s in sections}
    assert all(field.description for own in fields.values() for field in own.values())
    assert {name: len(own) for name, own in fields.items()} == {
        "Recipe": 6,
        "Model": 8,
        "Stage": 18,
        "Data": 7,
        "Checkpoint": 3,
    }
