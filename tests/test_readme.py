"""Commands of the documents, taken by the commands' own parsers; files that they name are there."""

import re
import shlex
from pathlib import Path

import pytest

from launcher import evaluate, jobs, options, predict
from launcher.errors import BadInput
from tests.conftest import ROOT

DOCUMENTS = ["README.md", "cluster/README.md"]
PARSERS = {
    "run": options.parser,
    "jobs": jobs._parser,
    "predict": predict._parser,
    "evaluate": evaluate._parser,
}


def documented() -> list[tuple[str, str, list[str]]]:
    """Return (document, program, arguments) of each line that starts one of the launcher's programs."""
    found = []
    for name in DOCUMENTS:
        text = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ")
        for line in text.splitlines():
            if not line.startswith((" ", "ray ", "python ", "sbatch ")):
                continue
            if match := re.search(r"python (?:launcher/|-m launcher\.)(\w+)(?:\.py)?\b(.*)", line):
                words = shlex.split(re.sub(r"[<|].*", "", match[2]), comments=True)
                found.append((name, match[1], words))
    return found


@pytest.mark.parametrize(("document", "program", "words"), documented(), ids=str)
def test_a_documented_command_is_taken(document: str, program: str, words: list[str]) -> None:
    given = PARSERS[program]().parse_args(words)
    if program == "jobs" and getattr(given, "arguments", None):
        given = options.parser().parse_args([each for each in given.arguments if each != "--"])
        program = "run"
    if program == "run" and str(given.ds) != "auto":
        assert (ROOT / given.ds).is_file(), given.ds


def test_enough_is_documented_to_be_checked() -> None:
    programs = [program for _, program, _ in documented()]
    assert set(programs) == set(PARSERS)
    assert len(programs) > 12


def test_what_a_job_does_not_take_along_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("stages: []")
    with pytest.raises(BadInput, match="is not below"):
        jobs._check_uploaded([str(tmp_path / "mine.yaml")])
    with pytest.raises(BadInput, match=r"say ds_configs/zero3\.json"):
        jobs._check_uploaded([str(ROOT / "ds_configs" / "zero3.json")])
    jobs._check_uploaded(["launcher/recipes/quickstart.yaml", "--workers", "2"])
