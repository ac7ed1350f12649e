"""The Slurm script against real Ray nodes on this machine. srun and scontrol are stubs: there is no Slurm here."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT
from tests.runs import environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

STUBS = Path(__file__).parent / "stubs"
# The job: says what it finds, tries to get in without the token, then ends or waits for a signal.
DRIVER = """
import os, pathlib, signal, subprocess, sys, time
import ray

folder = pathlib.Path(sys.argv[1])
def stop(*_):
    (folder / "saved").write_text("yes")
    sys.exit(130)
ray.init(log_to_driver=False)
signal.signal(signal.SIGTERM, stop)  # after Ray, which sets its own
nodes = [node for node in ray.nodes() if node["Alive"]]
places = ray.get([ray.remote(lambda: os.getpid()).options(num_cpus=1).remote() for _ in range(2)])
token = pathlib.Path(os.environ["RAY_AUTH_TOKEN_PATH"])
ask = "import os; from ray._raylet import GcsClient; GcsClient(address=os.environ['RAY_ADDRESS']).get_all_node_info()"
env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")} | {"HOME": str(folder)}
def asks(**more):
    done = subprocess.run([sys.executable, "-c", ask], env=env | more, capture_output=True, text=True)
    return done.returncode == 0, done.stderr
mine = asks(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token))
none = asks(RAY_AUTH_MODE="disabled")
(folder / "found").write_text(repr({
    "nodes": len(nodes), "tasks": len(places), "mode": oct(token.stat().st_mode & 0o777),
    "with_token": mine[0], "without": none[0], "refusal": none[1][-300:],
    "run_root": os.environ["LAUNCHER_RUN_ROOT"],
}))
if sys.argv[2] == "wait":
    time.sleep(300)
sys.exit(int(sys.argv[2]))
"""


class Job:
    """One job of the script, as sbatch would start it."""

    def __init__(self, folder: Path, *command: str) -> None:
        self.folder = folder
        self.id = random.randrange(10_000, 1_000_000)
        self.requeued = folder / "requeued"
        self.log = folder / "job.log"
        self.environment = environment(
            PATH=os.pathsep.join([str(STUBS), os.environ["PATH"]]),
            SLURM_JOB_ID=str(self.id),
            SLURM_JOB_NODELIST="node-[a-b]",
            SLURM_JOB_NUM_NODES="2",
            SLURM_CPUS_PER_TASK="1",
            SLURM_SUBMIT_DIR=str(ROOT),
            LAUNCHER_RUN_ROOT=str(folder / "runs"),
            STUB_REQUEUED=str(self.requeued),
            RAY_agent_register_timeout_ms="200000",
        )
        with open(self.log, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                ["bash", "cluster/slurm/ray.sbatch", *command],
                cwd=ROOT,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait_for(self, name: str, seconds: float = 240) -> str:
        """Return a file's text when the job has written it."""
        deadline = time.monotonic() + seconds
        while not (self.folder / name).exists():
            assert self.process.poll() is None and time.monotonic() < deadline, self.output()
            time.sleep(0.2)
        time.sleep(0.2)
        return (self.folder / name).read_text(encoding="utf-8")

    def output(self) -> str:
        """Return what the job has said."""
        return self.log.read_text(encoding="utf-8")

    def left_over(self) -> list[psutil.Process]:
        """Return this job's processes that are still there, by a variable that all of them have."""
        left = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("SLURM_JOB_ID") == str(self.id):
                    left.append(process)
            except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
        return left

    def check_gone(self) -> None:
        """Nothing of the job is left: no process, no token, no temporary folder."""
        deadline = time.monotonic() + 20
        while (left := self.left_over()) and time.monotonic() < deadline:
            time.sleep(0.5)
        assert not left
        assert not Path(f"/tmp/ray-{self.id}").exists()
        assert not list((self.folder / "runs").rglob("auth_token"))


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[list[str]]:
    """Yield the command of the job, without its last argument."""
    script = tmp_path / "driver.py"
    script.write_text(DRIVER, encoding="utf-8")
    yield [sys.executable, str(script), str(tmp_path)]


def finish(job: Job) -> None:
    """End what a failing test would leave: the processes that carry this job's id."""
    for process in job.left_over():
        process.kill()


def test_a_job_runs_on_all_nodes_behind_a_token_and_gives_its_exit_code(
    driver: list[str], tmp_path: Path
) -> None:
    job = Job(tmp_path, *driver, "7")
    try:
        assert job.process.wait(300) == 7, job.output()
        found = eval((tmp_path / "found").read_text(encoding="utf-8"))
        assert found["nodes"] == 2 and found["tasks"] == 2
        assert found["mode"] == "0o600" and found["run_root"] == str(tmp_path / "runs")
        assert found["with_token"] and not found["without"], found
        assert "auth" in found["refusal"].lower(), found
        job.check_gone()
        assert not job.requeued.exists()
    finally:
        finish(job)


@pytest.mark.parametrize(("number", "is_requeued"), [(signal.SIGTERM, False), (signal.SIGUSR1, True)])
def test_a_signal_lets_the_driver_save_and_ends_all(
    driver: list[str], tmp_path: Path, number: signal.Signals, is_requeued: bool
) -> None:
    job = Job(tmp_path, *driver, "wait")
    try:
        job.wait_for("found")
        job.process.send_signal(number)
        assert job.process.wait(120) == 130, job.output()
        assert (tmp_path / "saved").exists()
        job.check_gone()
        assert job.requeued.exists() == is_requeued
    finally:
        finish(job)


def test_a_cluster_that_does_not_come_up_ends_the_job(driver: list[str], tmp_path: Path) -> None:
    job = Job(tmp_path, *driver, "0")
    try:
        # Before the nodes are there: their step dies, as with a broken environment.
        deadline = time.monotonic() + 60
        step: list[psutil.Process] = []
        while not step and time.monotonic() < deadline:
            step = [each for each in job.left_over() if "ray_node.sh" in " ".join(each.cmdline())]
            time.sleep(0.1)
        for process in step:
            process.terminate()
        assert job.process.wait(120) == 3, job.output()
        assert "did not come up" in job.output() and not (tmp_path / "found").exists()
        job.check_gone()
    finally:
        finish(job)
