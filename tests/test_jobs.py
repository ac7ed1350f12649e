"""Submitted runs seen and stopped from another shell, on a cluster with a token; and no secret in what is left."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher import probes
from launcher.errors import ClusterError
from tests import heads
from tests.conftest import ROOT, free_port
from tests.runs import chat_recipe, environment

pytestmark = [pytest.mark.timeout(600)]
TOKEN = "f00dfacef00dfacef00dfacef00dface"
SECRETS = {"HF_TOKEN": "hf_SECRETsecretSECRET01", "AWS_SECRET_ACCESS_KEY": "awsSECRETsecretSECRET02"}


@pytest.fixture(scope="module")
def head() -> Iterator[dict[str, Any]]:
    """A cluster of one node with secrets in its environment and a token in a file; how to reach it."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    (folder / "token").write_text(TOKEN)
    dashboard = free_port()
    variables = environment(
        PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN_PATH=str(folder / "token"),
        RAY_TMPDIR=str(folder),
    )
    address = f"http://127.0.0.1:{dashboard}"
    found = {"env": variables | {"RAY_API_SERVER_ADDRESS": address}, "folder": folder, "address": address}
    options = [f"--port={free_port()}", f"--dashboard-port={dashboard}"]
    with heads.running(folder, options, variables | SECRETS, lambda: not jobs(found, "list").returncode, 1):
        yield found


def jobs(head: dict[str, Any], *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "launcher/jobs.py", *arguments]
    variables = head["env"] | extra
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_job_is_submitted_seen_and_stopped_with_a_checkpoint(
    head: dict[str, Any], chat_setup: dict[str, Any], tmp_path: Path
) -> None:
    recipe = chat_recipe(chat_setup, tmp_path / "chat.yaml", steps=5000)
    outside = jobs(head, "submit", "--", str(recipe))
    assert outside.returncode == 2
    assert "is not below" in outside.stderr
    assert jobs(head, "status").returncode == 2, "no job yet"
    # What a job takes along is below the checkout.
    folder = Path(tempfile.mkdtemp(prefix="test-", dir=ROOT))
    try:
        shutil.copy(recipe, folder / "chat.yaml")
        relative = str((folder / "chat.yaml").relative_to(ROOT))
        options = ["--ds", "ds_configs/zero2.json", "--run-root", str(tmp_path / "runs"), "--name", "it"]
        result = jobs(head, "submit", "--no-wait", "--", relative, *options, "--workers", "2")
    finally:
        shutil.rmtree(folder)
    assert result.returncode == 0, result.stderr
    name = result.stdout.split()[1]
    metrics = tmp_path / "runs" / "it" / "metrics.jsonl"
    until_s = time.monotonic() + 200
    while not (metrics.exists() and '"kind": "step"' in metrics.read_text()):
        assert time.monotonic() < until_s, jobs(head, "follow", name).stdout[-3000:]
        time.sleep(1)
    time.sleep(6)
    shown = jobs(head, "status", name[:14])
    assert f"job {name}: running" in shown.stdout
    assert f"run: {tmp_path / 'runs' / 'it'}" in shown.stdout
    assert "chat  step " in shown.stdout, shown.stdout
    listed = jobs(head, "list").stdout
    assert name in listed and "--name it" in listed and "chat  step " in listed
    stopped = jobs(head, "stop", name)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert "saved at step" in stopped.stdout
    assert f"job {name}: stopped" in stopped.stdout
    assert jobs(head, "stop", name).stdout == f"job {name}: stopped already\n"
    assert jobs(head, "follow", name).returncode != 0
    assert list((tmp_path / "runs" / "it" / "stages" / "chat" / "checkpoints").iterdir())
    no_secret_is_in([tmp_path / "runs", head["folder"]], head)


def no_secret_is_in(folders: list[Path], head: dict[str, Any]) -> None:
    """Read every file; the token's own is the only one that may hold it."""
    num_read = 0
    for file in (file for folder in folders for file in folder.rglob("*")):
        if file.is_file() and not file.is_symlink() and file != head["folder"] / "token":
            content = file.read_bytes()
            num_read += 1
            for secret in (*SECRETS.values(), TOKEN):
                assert secret.encode() not in content, file
    assert num_read > 50


@pytest.mark.slow
def test_a_wrong_token_and_a_wrong_address(head: dict[str, Any]) -> None:
    wrong = jobs(head, "list", RAY_AUTH_TOKEN_PATH="", RAY_AUTH_TOKEN="0" * 32)
    assert wrong.returncode == 3
    assert "does not take the token: export RAY_AUTH_MODE=token" in wrong.stderr
    assert TOKEN not in wrong.stderr
    nowhere = jobs(head, "list", "--address", f"http://127.0.0.1:{free_port()}")
    assert nowhere.returncode == 3
    assert nowhere.stderr.startswith("error: no jobs at http://127.0.0.1")
    assert "Traceback" not in nowhere.stderr


def test_other_software_than_the_drivers_is_refused_by_name() -> None:
    ours = probes.versions()
    probes.check_versions(ours, "here")
    with pytest.raises(
        ClusterError, match=r"node-7: torch is .* there and 2\.12\.0 on the driver: install the"
    ):
        probes.check_versions(ours | {"torch": "2.12.0"}, "node-7")
    with pytest.raises(ClusterError, match="launcher is"):
        probes.check_versions(json.loads(json.dumps(ours | {"launcher": "0.1.0+00000000"})), "node-7")
