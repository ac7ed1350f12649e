"""The commands of the documents: taken by the programs' own parsers, and run where that takes seconds."""

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher import evaluate, jobs
from launcher import run as launcher_run
from launcher.errors import BadInput
from tests import documents
from tests.cluster.test_commands import parse_ray
from tests.conftest import ROOT
from tests.documents import WITH_COMMANDS, Line
from tests.finished_runs import make_runs
from tests.programs import PARSERS, parsed, program

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


def is_the_readers(path: str | Path) -> bool:
    """Whether a file is the reader's to have: placeholders in capitals, `my-…`, and what lies in data/."""
    first = Path(path).parts[0]
    return first.isupper() or first.startswith("my-") or first in ("data", "recipe.yaml")


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


def test_an_option_that_is_not_there_is_found() -> None:
    with pytest.raises(SystemExit):
        parsed("run", ["--num-workers", "8"])


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


def test_what_a_job_does_not_take_along_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("stages: []")
    with pytest.raises(BadInput, match="is not below"):
        jobs._check_uploaded([str(tmp_path / "mine.yaml")])
    with pytest.raises(BadInput, match=r"say ds_configs/zero3\.json"):
        jobs._check_uploaded([str(ROOT / "ds_configs" / "zero3.json")])
    jobs._check_uploaded(["launcher/recipes/quickstart.yaml", "--workers", "2"])
