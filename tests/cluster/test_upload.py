"""What `ray job submit --working-dir .` sends, by Ray's own packaging."""

import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from ray._private import ray_constants
from ray._private.runtime_env.packaging import create_package

from tests.conftest import ROOT

MOST_BYTES = 2_000_000
RUBBISH = [
    ".venv/lib/python3.11/site-packages/torch.py",
    ".git/objects/pack",
    "runs/first/stages/chat/checkpoints/weights.safetensors",
    "data/train.parquet",
    "wandb/run/log",
    "launcher/__pycache__/run.pyc",
    "build/lib/launcher/run.py",
    ".env",
    "auth_token",
    "key.pem",
    "tests/cluster/test_upload.py",
    "benchmarks/results/data.json",
    "cluster/aws.yaml",
]


def sent(folder: Path, target: Path) -> list[zipfile.ZipInfo]:
    """Return what Ray would send of a folder, with what it leaves out on its own."""
    create_package(
        str(folder),
        target,
        include_gitignore=True,
        excludes=ray_constants.get_runtime_env_default_excludes(),
    )
    with zipfile.ZipFile(target) as package:
        return package.infolist()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a copy of the tracked files, with what lies about in a folder where people work."""
    folder = tmp_path / "checkout"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in listed.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    for name in RUBBISH:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("rubbish", encoding="utf-8")
    return folder


def test_the_upload_is_small_and_whole(checkout: Path, tmp_path: Path) -> None:
    package = tmp_path / "package.zip"
    names = {each.filename for each in sent(checkout, package)}
    assert package.stat().st_size < MOST_BYTES
    assert not names & set(RUBBISH)
    for part in ("launcher", "ds_configs"):
        for path in (checkout / part).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert str(path.relative_to(checkout)) in names
    assert {name.split("/")[0] for name in names} & {
        "tests",
        "benchmarks",
        "cluster",
        "runs",
        "data",
    } == set()


def test_nothing_that_git_ignores_is_sent(checkout: Path, tmp_path: Path) -> None:
    names = [each.filename for each in sent(checkout, tmp_path / "package.zip")]
    found = subprocess.run(
        ["git", "check-ignore", "--no-index", "--stdin"],
        cwd=ROOT,
        input="\n".join(names),
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split()
    assert found == []


def test_without_the_list_more_would_be_sent(checkout: Path, tmp_path: Path) -> None:
    (checkout / ".rayignore").unlink()
    names = {each.filename for each in sent(checkout, tmp_path / "package.zip")}
    assert {"auth_token", "key.pem", "cluster/aws.yaml"} <= names


def test_from_the_image_nothing_more_is_sent_though_gits_list_is_not_there(
    checkout: Path, tmp_path: Path
) -> None:
    (checkout / ".gitignore").unlink()
    names = {each.filename for each in sent(checkout, tmp_path / "package.zip")}
    assert not names & set(RUBBISH)
