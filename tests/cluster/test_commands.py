"""The commands of cluster/README.md: options that exist, files that exist, and words that are all filled in."""

import os
import re
import subprocess
from pathlib import Path

import click
import pytest
from ray.scripts.scripts import cli

from launcher.options import parser
from tests.cluster.files import CLUSTER, README, Command, blocks, commands, launch
from tests.conftest import ROOT

RAY = commands("ray")
LAUNCHES = [each for each in commands("ray", "sbatch", "python") if launch(each.words) is not None]


def parse_ray(words: list[str]) -> click.Context:
    """Parse a command line by Ray's own commands, down to the last; nothing is run."""
    command, rest, name = cli, list(words), "ray"
    while isinstance(command, click.Group):
        name = rest.pop(0)
        command = command.commands[name]
    return command.make_context(name, rest)


def test_there_is_something_to_check() -> None:
    assert {each.words[1] for each in RAY} >= {"up", "down", "dashboard", "exec", "job", "rsync-down"}
    assert len(LAUNCHES) >= 4


@pytest.mark.parametrize("command", RAY, ids=lambda each: " ".join(each.words[:4]))
def test_ray_knows_the_command(command: Command) -> None:
    parse_ray(command.words[1:])


def test_an_option_that_ray_does_not_have_is_found() -> None:
    with pytest.raises(click.exceptions.NoSuchOption):
        parse_ray(["job", "submit", "--working-directory", ".", "--", "python"])


@pytest.mark.parametrize("command", LAUNCHES, ids=lambda each: each.section)
def test_the_launcher_takes_its_arguments(command: Command) -> None:
    arguments = launch(command.words)
    assert arguments is not None
    options = parser().parse_args(arguments)
    assert (ROOT / options.ds).is_file()
    assert options.name, "without a name, a changed recipe would be another run"


def test_an_option_that_the_launcher_does_not_have_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["--num-workers", "8"])
    assert "--num-workers" in capsys.readouterr().err


def test_submitters_are_told_of_the_token() -> None:
    before = README.index("ray job submit --address")
    for line in ("export RAY_AUTH_MODE=token", "export RAY_AUTH_TOKEN_PATH="):
        assert README.index(line) < before


@pytest.mark.parametrize(("section", "block"), blocks(), ids=[section for section, _ in blocks()])
def test_the_shell_takes_each_block(section: str, block: str) -> None:
    done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def sed_commands() -> list[tuple[str, str]]:
    """Return the commands that fill in a file, each with the name of the file."""
    found = []
    for _, block in blocks():
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("sed "):
                name = re.search(r"cluster/(\w+)\.yaml", line)
                found.append((name[1] if name else "kubernetes", line))
    return found


@pytest.mark.parametrize(("name", "line"), sed_commands(), ids=[name for name, _ in sed_commands()])
def test_the_commands_fill_in_every_word(name: str, line: str, tmp_path: Path) -> None:
    words = set(re.findall(r"\$(\w+)", line)) - {"HOME"}
    environment = os.environ | {word: f"filled-{word.lower()}" for word in words} | {"HOME": str(tmp_path)}
    (tmp_path / "finetune").mkdir()
    files = [tmp_path / f"finetune-{name}.yaml"]
    if name == "kubernetes":
        files = []
        for path in (CLUSTER / "kubernetes").glob("*.yaml"):
            files.append(tmp_path / "finetune" / path.name)
            files[-1].write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    subprocess.run(["bash", "-c", line], cwd=ROOT, env=environment, check=True)
    for path in files:
        code = "\n".join(each for each in path.read_text(encoding="utf-8").splitlines() if each[:1] != "#")
        assert "REPLACE_" not in code, path.name
    text = "".join(path.read_text(encoding="utf-8") for path in files)
    assert all(f"filled-{word.lower()}" in text for word in words)


def test_every_file_that_is_named_is_there() -> None:
    named = set(re.findall(r"(?:cluster/)?((?:nodes|image|slurm|kubernetes)/[\w.-]+\.\w+)", README))
    assert len(named) >= 2
    assert all((CLUSTER / name).exists() for name in named)
    for name in re.findall(r"`(\w+\.yaml)`", README):
        assert (CLUSTER / name).exists() or (CLUSTER / "kubernetes" / name).exists(), name


def test_secrets_never_stand_in_a_command() -> None:
    for _, block in blocks():
        for variable in ("RAY_AUTH_TOKEN=", "HF_TOKEN=hf", "WANDB_API_KEY=", "--from-literal"):
            assert variable not in block.replace('HF_TOKEN="$HOME', "")
