"""The documents tell the truth: their commands are taken, and run where that takes seconds; recipes, ds configs and links."""

import importlib
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from launcher import evaluate, jobs, options, predict, recipe_file, verdict
from launcher import recipe as recipes
from launcher import run as launcher_run
from launcher.errors import BadInput, RecipeError
from launcher.plan import zero
from launcher.recipes import train_tokenizer
from tests import documents
from tests.cluster.test_commands import parse_ray
from tests.conftest import ROOT
from tests.documents import ALL, WITH_COMMANDS, Block, Line
from tests.finished_runs import make_runs

PARSERS = {
    "run": options.parser,
    "jobs": jobs._parser,
    "predict": predict._parser,
    "evaluate": evaluate._parser,
    "train_tokenizer": train_tokenizer._parser,
}
SHELL_ONLY = {
    "on any machine": {
        "pip",
        "python3.11",
        ".",
        "export",
        "cp",
        "mkdir",
        "cd",
        "git",
        "sed",
        "sleep",
        "for",
        "ls",
    },
    "in need of a cloud": {"aws", "az", "docker", "gcloud", "helm", "kubectl", "sbatch", "scancel", "squeue"},
}
"""Commands of which only the shell's grammar is checked, and why."""
STOPS_SOON = {"plan", "show_recipe", "schema"}
LINES = [line for document in WITH_COMMANDS for line in documents.commands(document)]
BLOCKS = [block for document in ALL for block in documents.blocks(document)]


def program(words: list[str]) -> tuple[str, list[str]] | None:
    """Return which of the launcher's programs a command starts, by its module's name, and its arguments."""
    if "--" in words and words[0] in ("ray", "sbatch"):
        words = words[words.index("--") + 1 :]
    elif words[0] == "sbatch":
        words = words[next(i for i, word in enumerate(words) if word.endswith("python")) :]
    first = words[0].rpartition("/")[2]
    if first == "launcher":
        module = words[1] if len(words) > 1 and (ROOT / "launcher" / f"{words[1]}.py").exists() else "run"
        return module, words[2:] if module != "run" else words[1:]
    if first.startswith("launcher-"):
        return first.removeprefix("launcher-"), words[1:]
    if first == "python" and words[1:2] == ["-m"] and words[2].startswith("launcher."):
        return words[2].removeprefix("launcher."), words[3:]
    if first == "python" and words[1:2] and words[1].startswith("launcher/"):
        return Path(words[1]).stem, words[2:]
    return None


def parsed(module: str, arguments: list[str]) -> Any:
    """Parse arguments by the program's own parser; what a job is to run, by that one's."""
    make = PARSERS.get(module)
    if make is None:
        found = importlib.import_module(f"launcher.{module}")
        # A command of a command has a parser of its own: runs clean.
        if arguments and (of_word := getattr(found, f"{arguments[0]}_parser", None)):
            return of_word().parse_args(arguments[1:])
        make = getattr(found, "parser", None) or found._parser
    if {"--help", "-h"} & set(arguments):
        return make()
    given = make().parse_args(arguments)
    if module == "jobs" and getattr(given, "arguments", None):
        return parsed("run", [each for each in given.arguments if each != "--"])
    return given


def all_parsers() -> list[Callable[[], Any]]:
    """Return what makes the parser of each command, and of each command's commands."""
    found = list(PARSERS.values())
    for name in ("watch", "runs", "compare"):
        if (ROOT / "launcher" / f"{name}.py").exists():
            module = importlib.import_module(f"launcher.{name}")
            found += [
                make for each, make in vars(module).items() if each.endswith("parser") and callable(make)
            ]
    return found


def is_the_readers(path: str | Path) -> bool:
    """Whether a file is the reader's to have: placeholders in capitals, `my-…`, and what lies in data/."""
    first = Path(path).parts[0]
    return first.isupper() or first.startswith("my-") or first == "data"


def unique(lines: list[Line]) -> list[Line]:
    return list({line.text: line for line in lines}.values())


@pytest.mark.parametrize("line", LINES, ids=str)
def test_a_command_is_taken(line: Line) -> None:
    done = subprocess.run(["bash", "-n"], input=line.block.text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    words = line.words
    if not words or re.match(r"\(|\w+=", line.text):
        return  # An assignment, or a group: the shell has taken it.
    if words[0] == "ray":
        parse_ray(words[1:])
    if found := program(words):
        given = parsed(*found)
        for name in ("recipe", "ds"):
            path = getattr(given, name, None)
            if path is not None and str(path) != "auto" and not is_the_readers(path):
                assert (ROOT / path).is_file(), path
    elif words[0] == "make":
        targets = re.findall(r"^(\w+):", documents.read("Makefile"), flags=re.MULTILINE)
        assert {word for word in words[1:] if "=" not in word} <= set(targets)
    elif words[0].endswith("python") and len(words) > 1:
        assert words[1] in ("-m", "-c") or (ROOT / words[1]).is_file(), words[1]
    elif words[0] != "ray":
        known = set().union(*SHELL_ONLY.values())
        assert words[0] in known or (ROOT / words[0]).exists(), f"nothing checks {words[0]}: {line}"


def test_enough_is_documented_to_be_checked() -> None:
    found = [found for line in LINES if line.words and (found := program(line.words))]
    assert {module for module, _ in found} >= set(PARSERS)
    assert len(found) > 40
    assert {block.kind for block in BLOCKS} == {"bash", "yaml", "json", "python", "text"}


def test_what_is_wrong_is_found() -> None:
    with pytest.raises(SystemExit):
        parsed("run", ["--num-workers", "8"])
    with pytest.raises(RecipeError, match="learning_rate"):
        check_recipe(
            "stages: [{name: a, task: causal-lm, data: {train: x}, learnin_rate: 1}]\nmodel: {path: x}",
            Path("/"),
        )
    assert "commands-that-are-not-there" not in documents.headings("README.md")


def stops_soon(line: Line) -> bool:
    """Whether a command ends within seconds, and can do so anywhere."""
    found = program(line.words) if line.words else None
    if found is None or line.words[0] in ("ray", "sbatch"):
        return False
    module, arguments = found
    if "--help" in arguments:
        return True
    if module != "run":
        return False
    try:
        given = parsed(module, arguments)
    except SystemExit:
        return False  # The test of each command tells it.
    is_ours = not is_the_readers(given.recipe) and not is_the_readers(given.ds) and not given.address
    of_data = (ROOT / given.recipe).is_file() and "../data/" in (ROOT / given.recipe).read_text()
    return is_ours and not of_data and any(getattr(given, name) for name in STOPS_SOON)


@pytest.mark.slow
@pytest.mark.parametrize("line", unique([line for line in LINES if stops_soon(line)]), ids=str)
def test_a_command_that_stops_soon_is_run(
    line: Line, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("LAUNCHER_RUN_ROOT", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    found = program(line.words)
    assert found is not None
    module, arguments = found
    main = launcher_run.main if module == "run" else importlib.import_module(f"launcher.{module}").main
    if "--help" in arguments:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0
    else:
        assert main(arguments) == 0
    assert capsys.readouterr().out


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a finished run of each task, under the names that the documents have."""
    folder = tmp_path_factory.mktemp("finished")
    names = make_runs(folder)
    (folder / "RUN_DIR").symlink_to(folder / "runs" / names["text-classification"], target_is_directory=True)
    (folder / "bin").mkdir()
    python = folder / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    yield folder


def asks_a_run(name: str) -> list[Line]:
    found = [(line, program(line.words)) for line in LINES if line.words]
    return unique([line for line, it in found if it and it[0] == name and "--help" not in it[1]])


@pytest.mark.slow
@pytest.mark.parametrize("line", asks_a_run("predict"), ids=str)
def test_predict_is_run_as_it_stands(line: Line, finished: Path) -> None:
    env = os.environ | {"PATH": f"{finished / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", line.text], cwd=finished, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    given = (finished / "lines.txt").read_text() if "lines.txt" in line.text else "one line\n"
    assert done.stdout.count("\n") == given.count("\n")


@pytest.mark.slow
@pytest.mark.parametrize("line", asks_a_run("evaluate"), ids=str)
def test_evaluate_is_run(
    line: Line, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished)
    found = program(line.words)
    assert found is not None
    assert evaluate.main(found[1]) == 0, capsys.readouterr().err
    assert re.search(r"^\w+ [0-9.]+", capsys.readouterr().out, flags=re.MULTILINE)


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


@pytest.mark.parametrize("document", ["README.md", *(each for each in ALL if each.startswith("docs/"))])
def test_files_and_options_in_the_text_are_there(document: str) -> None:
    text = documents.read(document)
    of_text = re.findall(
        r"`([^`\n]+)`", re.sub(r"^\s*```.*?^\s*```$", "", text, flags=re.DOTALL | re.MULTILINE)
    )
    ours = re.compile(r"(?:tests|launcher|benchmarks|ds_configs|cluster)/[\w./-]+\.\w+")
    for path in {path for code in of_text for path in ours.findall(code)} - {
        "launcher/tasks/pair_ranking.py"
    }:
        assert (ROOT / path).exists() or path.startswith("tests/tasks/test_pair"), path
    # `pip` and `ray` have options too; those of the documents are few.
    known = {"--constraint", "--working-dir", "--runtime-env-json"}
    for make in all_parsers():
        parsers = [make()]
        for parser in parsers:
            known |= set(parser._option_string_actions)
            for action in parser._actions:
                if isinstance(action.choices, dict):
                    parsers += action.choices.values()
    for code in of_text:
        if not code.startswith(("launcher ", "pip ", "pytest ")):
            assert set(re.findall(r"(?<!\S)--[a-z][\w-]*", code)) <= known, code


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


def test_what_a_job_does_not_take_along_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("stages: []")
    with pytest.raises(BadInput, match="is not below"):
        jobs._check_uploaded([str(tmp_path / "mine.yaml")])
    with pytest.raises(BadInput, match=r"say ds_configs/zero3\.json"):
        jobs._check_uploaded([str(ROOT / "ds_configs" / "zero3.json")])
    jobs._check_uploaded(["launcher/recipes/quickstart.yaml", "--workers", "2"])
