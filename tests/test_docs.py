"""The documents tell the truth: recipes, ds configs, links, options and files that they name."""

import json
import re
import textwrap
from pathlib import Path
from typing import get_args

import pytest
import yaml

from launcher import options, recipe_file, verdict
from launcher import recipe as recipes
from launcher.errors import RecipeError
from launcher.plan import zero
from tests import documents
from tests.conftest import ROOT
from tests.documents import ALL, Block
from tests.programs import all_parsers

BLOCKS = [block for document in ALL for block in documents.blocks(document)]


def test_what_is_wrong_is_found() -> None:
    with pytest.raises(RecipeError, match="learning_rate"):
        check_recipe(
            "stages: [{name: a, task: causal-lm, data: {train: x}, learnin_rate: 1}]\nmodel: {path: x}",
            Path("/"),
        )
    assert {block.kind for block in BLOCKS} == {"bash", "yaml", "json", "python", "diff", "text"}
    assert "commands-that-are-not-there" not in documents.headings("README.md")


def check_recipe(text: str, folder: Path) -> None:
    """Read a whole recipe, a part of one, or a stage's keys.

    Raises:
        RecipeError: no task takes it.
    """
    tree = yaml.safe_load(text)
    # The page on adding a task has one that is not there yet; what it does is tested with the page's code.
    text = text.replace("pair-ranking", "text-classification")
    whole = {
        "model": {"path": "x"},
        "stages": [{"name": "a", "task": "", "data": {"train": "x", "eval": "x"}}],
    }
    if "stages" in tree:
        candidates = [text]
    elif set(tree) <= set(recipes.Recipe.model_fields):
        whole["stages"][0]["task"] = "text-classification"
        candidates = [yaml.safe_dump(whole | tree)]
    else:
        stage = whole["stages"][0] | tree
        candidates = [
            yaml.safe_dump(whole | {"stages": [stage | {"task": task}]})
            for task in get_args(recipes.TaskName)
        ]
    errors = []
    for each in candidates:
        (folder / "recipe.yaml").write_text(each, encoding="utf-8")
        try:
            recipe_file.load(folder / "recipe.yaml")
            return
        except RecipeError as error:
            errors.append(error)
    raise errors[0]


def of_kind(kind: str) -> list[Block]:
    return [block for block in BLOCKS if block.kind == kind]


@pytest.mark.parametrize("block", of_kind("yaml"), ids=str)
def test_a_recipe_is_taken(block: Block, tmp_path: Path) -> None:
    check_recipe(textwrap.dedent(block.text), tmp_path)


@pytest.mark.parametrize("block", of_kind("json"), ids=str)
def test_a_ds_config_is_taken(block: Block) -> None:
    zero.check(json.loads(block.text), str(block))


@pytest.mark.parametrize("document", ALL)
def test_links_lead_somewhere(document: str) -> None:
    dead = []
    for target in documents.links(document):
        path, _, anchor = target.partition("#")
        there = (ROOT / document).parent / path if path else ROOT / document
        is_there = there.exists()
        if is_there and anchor:
            is_there = anchor in documents.headings(str(there.resolve().relative_to(ROOT)))
        dead += [] if is_there else [target]
    assert not dead


def code_in_text(document: str) -> list[str]:
    """Return what stands between single backquotes."""
    text = re.sub(r"^\s*```.*?^\s*```$", "", documents.read(document), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`([^`\n]+)`", text)


@pytest.mark.parametrize("document", ALL)
def test_files_in_the_text_are_there(document: str) -> None:
    ours = re.compile(r"(?:tests|launcher|benchmarks|ds_configs|cluster)/[\w./-]+\.\w+")
    of_example = {"launcher/tasks/pair_ranking.py", "tests/tasks/test_pair_ranking.py"}
    for path in {path for code in code_in_text(document) for path in ours.findall(code)} - of_example:
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("document", ["README.md", *(each for each in ALL if each.startswith("docs/"))])
def test_options_in_the_text_are_there(document: str) -> None:
    known = {"--working-dir"}  # Ray's
    for make in all_parsers():
        parsers = [make()]
        for parser in parsers:
            known |= set(parser._option_string_actions)
            for action in parser._actions:
                if isinstance(action.choices, dict):
                    parsers += action.choices.values()
    for code in code_in_text(document):
        if not code.startswith(("pip ", "pytest ")):
            assert set(re.findall(r"(?<!\S)--[a-z][\w-]*", code)) <= known, code


def test_options_of_benchmarks_are_there() -> None:
    found = [
        re.match(r"python (benchmarks/\w+\.py)(.*)", code) for code in code_in_text("benchmarks/README.md")
    ]
    commands = [each for each in found if each]
    assert len(commands) > 5
    for command in commands:
        script = documents.read(command[1])
        for option in re.findall(r"--[a-z][\w-]*", command[2]):
            assert f'"{option}"' in script, command[0]


def test_every_recipe_and_every_verdict_has_its_place() -> None:
    pages = "".join(documents.read(document) for document in ALL)
    for path in (ROOT / "launcher" / "recipes").glob("*.yaml"):
        assert f"launcher/recipes/{path.name}" in pages
        recipe_file.load(path)
    for name in get_args(recipes.TaskName):
        assert f"tasks/{name}.md" in documents.read(
            "docs/tasks/README.md"
        ) or f"({name}.md)" in documents.read("docs/tasks/README.md")
    of_failures = documents.headings("docs/failures.md")
    for kind in get_args(verdict.Kind):
        assert kind.lower().replace(" ", "-") in of_failures, kind


def test_every_option_is_told() -> None:
    page = documents.read("docs/commands.md")
    for option in options.parser()._option_string_actions:
        assert option in ("-h", "--help") or f"`{option}" in page, option


def test_the_readme_is_short() -> None:
    assert len(documents.read("README.md").splitlines()) <= 130
