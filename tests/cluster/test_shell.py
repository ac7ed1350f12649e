"""The scripts, the shell inside the YAML files, and the image's recipe, by the linters of each."""

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.files import CLOUDS, CLUSTER, ray_up, text_of
from tests.conftest import ROOT

BIN = Path(sys.executable).parent
SCRIPTS = [
    *CLUSTER.glob("*/*.sh"),
    *CLUSTER.glob("*/*.sbatch"),
    *(ROOT / "tests" / "cluster" / "stubs").iterdir(),
]
DOCKERFILE = CLUSTER / "image" / "Dockerfile"


def shellcheck(text: str) -> str:
    """Return what shellcheck says of a script; nothing where it is content."""
    command = [str(BIN / "shellcheck"), "--shell=bash", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False).stdout


def commands_of(config: dict[str, Any]) -> list[str]:
    """Return every shell command of a `ray up` file, of node types too."""
    keys = [key for key in config if key.endswith("_commands")]
    found = [command for key in keys for command in config[key]]
    for kind in config.get("available_node_types", {}).values():
        found += [command for key in kind if key.endswith("_commands") for command in kind[key]]
    return found


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_the_scripts(path: Path) -> None:
    assert shellcheck(text_of(path)) == ""


@pytest.mark.parametrize("name", [*CLOUDS, "machines"])
def test_the_shell_inside_the_files(name: str) -> None:
    commands = commands_of(ray_up(name))
    assert len(commands) >= 6
    for command in commands:
        assert shellcheck(f"#!/bin/bash\nexport RAY_HEAD_IP=x\n{command}\n") == "", command


def test_a_fault_in_the_shell_is_found() -> None:
    assert "SC2086" in shellcheck("#!/bin/bash\nrm $1\n")


def test_the_scripts_that_nodes_run_are_sent_to_them() -> None:
    for name in [*CLOUDS, "machines"]:
        config = ray_up(name)
        where = f"/tmp/ray_tmp_mount/{config['cluster_name']}"
        for command in config["initialization_commands"]:
            if ".sh" not in command:
                continue
            script = next(word for word in command.split() if word.endswith(".sh"))
            remote = str(Path(script.removeprefix(where)).parent)
            assert (ROOT / config["file_mounts"][remote] / Path(script).name).is_file(), script


MODELS = {
    "Amazon EC2 NVMe Instance Storage": True,
    "nvme_card": True,
    "nvme_card0": True,
    "Microsoft NVMe Direct Disk": True,
    "Microsoft NVMe Direct Disk v2": True,
    "Amazon Elastic Block Store": False,
    "nvme_card-pd": False,
    "MSFT NVMe Accelerator v1.0": False,
    "Virtual Disk": False,
    "SAMSUNG MZ7LH960": False,
}


@pytest.mark.parametrize(("model", "is_local"), MODELS.items())
def test_only_local_disks_are_formatted(model: str, is_local: bool) -> None:
    """A network disk that is taken for a local one would be erased."""
    line = next(
        each
        for each in text_of(CLUSTER / "nodes" / "local_nvme.sh").splitlines()
        if each.startswith("local_models=")
    )
    done = subprocess.run(["bash", "-c", f'{line}; [[ "$1" =~ $local_models ]]', "-", model], check=False)
    assert (done.returncode == 0) == is_local


def hadolint(text: str) -> str:
    return subprocess.run(
        [str(BIN / "hadolint"), "--no-color", "-"], input=text, capture_output=True, text=True, check=False
    ).stdout


def test_the_image() -> None:
    assert hadolint(text_of(DOCKERFILE)) == ""


def test_a_fault_in_an_image_is_found() -> None:
    assert "DL3007" in hadolint("FROM ubuntu:latest\n")


def test_the_image_takes_the_constraints_and_is_not_roots() -> None:
    text = text_of(DOCKERFILE)
    installs = [line for line in text.replace("\\\n", " ").splitlines() if "pip install" in line]
    assert installs and all("-c constraints.txt" in line or "--no-deps" in line for line in installs)
    users = [line for line in text.splitlines() if line.startswith("USER")]
    assert users == ["USER 1000:1000"], "a number, or Kubernetes could not tell that it is not root"
    assert "python3.11 -m venv" in text and "libaio-dev" in text
    extras = tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]["optional-dependencies"]
    assert "boto3" in extras["clusters"]


def test_every_file_that_the_image_copies_is_let_in() -> None:
    ignored = text_of(CLUSTER / "image" / "Dockerfile.dockerignore").split()
    for line in text_of(DOCKERFILE).splitlines():
        if line.startswith("COPY"):
            for name in line.split()[2:-1]:
                assert f"!{name}" in ignored and (ROOT / name).exists()
