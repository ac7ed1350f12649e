"""Submitting to a cluster with a token and a head without CPUs, as cluster/README.md says it: real Ray, on this machine."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.cluster.files import of_kind
from tests.conftest import ROOT, free_port
from tests.runs import environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

RAY = str(Path(sys.executable).parent / "ray")


class Head:
    """A head as the start commands of the cluster files make it, apart from any other cluster."""

    def __init__(self, folder: Path) -> None:
        self.token = folder / ".launcher-token" / "auth_token"
        self.token.parent.mkdir(mode=0o700)
        self.token.write_text("3" * 64, encoding="utf-8")
        self.token.chmod(0o600)
        self.temporary = tempfile.mkdtemp(prefix="ray-")  # paths of sockets have to be short
        self.dashboard = free_port()
        self.mark = f"head-of-{os.getpid()}-{self.dashboard}"
        # A home of its own, so that no token of this machine's user is found by chance.
        self.bare = environment(HOME=str(folder), HEAD_MARK=self.mark, RAY_agent_register_timeout_ms="200000")
        self.bare["PATH"] = os.pathsep.join([str(Path(RAY).parent), self.bare["PATH"]])
        self.with_token = self.bare | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token)}
        command = [
            *(RAY, "start", "--head", "--num-cpus=0", f"--port={free_port()}", "--dashboard-host=127.0.0.1"),
            *(f"--dashboard-port={self.dashboard}", f"--dashboard-agent-listen-port={free_port()}"),
            *("--ray-client-server-port", str(free_port()), "--min-worker-port=0", "--max-worker-port=0"),
            *(f"--temp-dir={self.temporary}", "--object-store-memory=80000000", "--disable-usage-stats"),
        ]
        started = self.with_token | {"LAUNCHER_RUN_ROOT": "/shared/runs"}
        done = subprocess.run(command, env=started, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def submit(
        self, env: dict[str, str], *words: str, runtime_env: str = "{}"
    ) -> subprocess.CompletedProcess:
        """Submit a job and wait for its end."""
        address = f"http://127.0.0.1:{self.dashboard}"
        command = [
            RAY,
            "job",
            "submit",
            "--address",
            address,
            "--runtime-env-json",
            runtime_env,
            "--",
            *words,
        ]
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)

    def close(self) -> None:
        """End the processes that carry this head's mark."""
        for process in psutil.process_iter():
            try:
                if process.environ().get("HEAD_MARK") == self.mark:
                    process.kill()
            except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
        shutil.rmtree(self.temporary, ignore_errors=True)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """Yield a head with a token."""
    one = Head(tmp_path_factory.mktemp("home"))
    try:
        yield one
    finally:
        one.close()


def test_without_the_exported_mode_it_is_refused(head: Head) -> None:
    path_alone = head.bare | {"RAY_AUTH_TOKEN_PATH": str(head.token)}
    for env in (head.bare, path_alone):
        done = head.submit(env, "python", "-c", "print(1)")
        assert done.returncode != 0
        assert "401" in done.stdout + done.stderr or "token" in (done.stdout + done.stderr).lower()


def test_another_token_is_refused(head: Head, tmp_path: Path) -> None:
    other = tmp_path / "auth_token"
    other.write_text("4" * 64, encoding="utf-8")
    done = head.submit(head.with_token | {"RAY_AUTH_TOKEN_PATH": str(other)}, "python", "-c", "print(1)")
    assert done.returncode != 0


def test_the_manifests_entrypoint_finds_the_launcher_and_the_run_root(head: Head) -> None:
    """With the job's own runtime environment: a folder, sent by the submitter. The head has no CPU, and runs it."""
    import yaml

    job = next(each for name, each in of_kind("RayJob") if name == "rayjob.yaml")
    given = yaml.safe_load(job["spec"]["runtimeEnvYAML"])
    assert given["working_dir"] == "/opt/launcher", "where cluster/image puts the repository"
    given["working_dir"] = str(ROOT)
    words = [*job["spec"]["entrypoint"].split(), "--show-recipe"]
    done = head.submit(head.with_token, *words, runtime_env=json.dumps(given))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stages:" in done.stdout
    ask = "import os; print('root', os.environ['LAUNCHER_RUN_ROOT'], os.environ['RAY_JOB_STOP_WAIT_TIME_S'])"
    done = head.submit(head.with_token, "python", "-c", ask, runtime_env=json.dumps(given))
    assert "root /shared/runs 60" in done.stdout, done.stdout + done.stderr


def test_every_failure_is_a_one(head: Head) -> None:
    assert head.submit(head.with_token, "python", "-c", "raise SystemExit(7)").returncode == 1
