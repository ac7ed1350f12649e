"""Two hosts in network namespaces, and the link between them cut: while training, shortly and for good."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.runs import Run, chat_recipe, environment

pytestmark = [pytest.mark.timeout(900), pytest.mark.chaos]
HOSTS = ("launcher-test-1", "launcher-test-2")
ADDRESSES = ("10.77.41.1", "10.77.41.2")
PORT = 41_379
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef"}


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[None]:
    """Two hosts with an address each, and a link between them."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need iproute2 and root")
    try:
        for name, address in zip(HOSTS, ADDRESSES, strict=True):
            ip("netns", "add", name)
            folder = Path("/etc/netns") / name
            folder.mkdir(parents=True, exist_ok=True)
            # Of each host its own name is its own address, as on machines of a cloud.
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n")
        ip(
            "link",
            "add",
            "ltest1",
            "netns",
            HOSTS[0],
            "type",
            "veth",
            "peer",
            "name",
            "ltest2",
            "netns",
            HOSTS[1],
        )
        for i, (name, address) in enumerate(zip(HOSTS, ADDRESSES, strict=True), 1):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", f"ltest{i}")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", f"ltest{i}", "up")
        yield
    finally:
        for name in HOSTS:
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "delete", name)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)


@pytest.fixture
def cluster(hosts: None) -> Iterator[str]:
    """Ray on both hosts with a CPU each; its address."""
    folders = [tempfile.mkdtemp(prefix="ray-") for _ in HOSTS]
    started = []
    try:
        for i, (address, folder) in enumerate(zip(ADDRESSES, folders, strict=True)):
            place = (
                ["--head", f"--port={PORT}", "--include-dashboard=false"]
                if i == 0
                else [f"--address={ADDRESSES[0]}:{PORT}"]
            )
            options = [
                f"--node-ip-address={address}",
                "--num-cpus=1",
                "--object-store-memory=80000000",
                "--block",
            ]
            command = [
                str(Path(sys.executable).parent / "ray"),
                "start",
                *place,
                *options,
                f"--temp-dir={folder}",
            ]
            if i:
                command = [each for each in command if not each.startswith("--temp-dir")]
            started.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", HOSTS[i], *command],
                    env=environment(PYTHONPATH=str(ROOT), RAY_TMPDIR=folder, **TOKEN),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
            )
            time.sleep(8)
        yield f"{ADDRESSES[0]}:{PORT}"
    finally:
        for each in started:
            os.killpg(each.pid, signal.SIGTERM)
        time.sleep(3)
        for each in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(each.pid, signal.SIGKILL)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def run_of(recipe: Path, runs: Path, *arguments: str) -> Run:
    run = Run(recipe, runs, *arguments, "--set", "checkpoint.every_steps=10", ds="zero3.json", **TOKEN)
    run.command = ["ip", "netns", "exec", HOSTS[0], *run.command]
    return run


def test_a_link_that_is_cut(cluster: str, chat_setup: dict[str, Any], tmp_path: Path) -> None:
    recipe = chat_recipe(chat_setup, tmp_path / "chat.yaml", steps=3000)
    run = run_of(recipe, tmp_path / "runs", "--workers", "1:2", "--address", cluster)
    run.start().wait_for_step(15)
    assert run.events("stage_begin")[-1]["num_workers"] == 2
    begun = len(run.events("stage_begin"))
    # For some seconds: the ranks wait for each other, and nothing is lost.
    ip("-n", HOSTS[0], "link", "set", "ltest1", "down")
    time.sleep(6)
    ip("-n", HOSTS[0], "link", "set", "ltest1", "up")
    before = run.last_step()
    run.wait_for_step(before + 5)
    assert len(run.events("stage_begin")) == begun
    # For good: the run goes on with the host that is left.
    ip("-n", HOSTS[0], "link", "set", "ltest1", "down")
    cut_s = time.time()
    run.wait_until(lambda: len(run.events("stage_begin")) > begun, "a start with what is left")
    run.wait_until(lambda: run.events("step")[-1]["time"] > run.events("stage_begin")[-1]["time"], "a step")
    print(f"next step {run.events('step')[-1]['time'] - cut_s:.1f} s after the link was cut for good")
    assert run.events("stage_begin")[-1]["num_workers"] == 1
    run.send(signal.SIGTERM)
    assert run.end(90) == 130, run.output()
    last = min(run.last_step(), 60)
    lone = Run(recipe, tmp_path / "lone", "--workers", "2", ds="zero3.json").start()
    lone.wait_for_step(last)
    lone.send(signal.SIGTERM)
    assert lone.end(90) == 130
    largest = max(abs(run.losses()[i] - lone.losses()[i]) / lone.losses()[i] for i in range(1, last + 1))
    print(f"{last} steps, largest relative difference of losses {largest:.1e}")
    assert largest < 1e-3
