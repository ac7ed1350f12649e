"""A real autoscaler over nodes that are raylets on this machine."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from ray._private.services import get_node_ip_address
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from tests.conftest import ROOT, free_port
from tests.runs import environment

TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef"}


HEAD = "ray.head.default"
"""As the provider of such nodes calls it."""


class Fleet:
    """A head without CPUs, and an autoscaler that adds nodes of some types and takes them away when idle.

    As `ray.cluster_utils.AutoscalingCluster` does it, whose own start ends every other Ray of the machine.
    """

    def __init__(self, types: dict[str, dict[str, Any]], idle_s: float) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ray-"))
        self.port, self.dashboard = free_port(), free_port()
        config = {
            "cluster_name": "fleet",
            "max_workers": 8,
            "idle_timeout_minutes": idle_s / 60,
            "upscaling_speed": 1.0,
            "provider": {
                # As "fake_multinode" it needs a file that the wheel of Ray does not have.
                "type": "external",
                "module": "tests.fleet_nodes.Nodes",
                "use_node_id_as_ip": True,
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
                "launch_multiple": True,
                "head_node_id": FAKE_HEAD_NODE_ID,
                "gcs_address": self.address,
            },
            "auth": {},
            **{f"{of}setup_commands": [] for of in ("", "head_", "worker_")},
            **{f"{of}_start_ray_commands": [] for of in ("head", "worker")},
            "initialization_commands": [],
            "file_mounts": {},
            "cluster_synced_files": [],
            "head_node_type": HEAD,
            "available_node_types": {
                HEAD: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
                **{name: {"node_config": {}, "min_workers": 0, **kind} for name, kind in types.items()},
            },
        }
        (self.folder / "autoscaler.json").write_text(json.dumps(config))
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """Of the cluster."""
        return f"{get_node_ip_address()}:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """Of commands that reach it."""
        own = {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": str(self.folder)}
        return environment(RAY_ADDRESS=f"http://127.0.0.1:{self.dashboard}", **own, **TOKEN)

    def start(self) -> None:
        """Start the head and the autoscaler."""
        command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus=0"]
        command += [
            f"--port={self.port}",
            f"--dashboard-port={self.dashboard}",
        ]
        command += [f"--autoscaling-config={self.folder / 'autoscaler.json'}", f"--temp-dir={self.folder}"]
        command += ["--object-store-memory=80000000", f"--dashboard-agent-listen-port={free_port()}"]
        settings = {
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
            "RAY_agent_register_timeout_ms": "200000",
        }
        own = {key: value for key, value in self.environment.items() if key != "RAY_ADDRESS"}
        with open(self.folder / "head.log", "wb") as log:
            self.process = subprocess.Popen(
                command, env=own | settings, stdout=log, stderr=log, start_new_session=True
            )
        until_s = time.monotonic() + 90
        while "To terminate the Ray runtime" not in (self.folder / "head.log").read_text(errors="replace"):
            assert self.process.poll() is None, (self.folder / "head.log").read_text()
            assert time.monotonic() < until_s, (self.folder / "head.log").read_text()
            time.sleep(0.5)

    def raylets(self) -> list[psutil.Process]:
        """The raylets of the nodes that were added."""
        found = [each for each in self.processes() if Path(each.info["cmdline"][0]).name == "raylet"]
        return [each for each in found if "--head" not in each.info["cmdline"]]

    def processes(self) -> list[psutil.Process]:
        """Everything of this cluster that runs: its folder is in each command line, or in the environment."""
        found = []
        for each in psutil.process_iter(["cmdline"]):
            with contextlib.suppress(psutil.Error):
                is_ours = each.environ().get("RAY_TMPDIR") == str(self.folder)
                line = each.info["cmdline"] or []
                if line and (is_ours or any(str(self.folder) in part for part in line)):
                    found.append(each)
        return [each for each in found if each.pid != os.getpid()]

    def stop(self) -> None:
        """End it all."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            for each in self.processes():
                with contextlib.suppress(psutil.Error):
                    each.send_signal(number)
            time.sleep(2)
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def fleet(types: dict[str, dict[str, Any]], idle_s: float = 30) -> Iterator[Fleet]:
    """Yield a cluster that grows when it is asked to.

    Args:
        types: by name, `resources` and `max_workers` of the nodes that may be added.
        idle_s: after which a node without work goes.
    """
    found = Fleet(types, idle_s)
    try:
        found.start()
        yield found
    finally:
        found.stop()
