"""Processes that are ready before they are wanted: they have imported everything, so that no start waits for that.

One beside every worker, so that a restart does not wait; and those of a start, all ordered as soon as it is known where.

Ray keeps idle processes, and makes an actor in one whose runtime environment is the same. Left alone it has none for
training's environment; each worker asks its raylet for one, by the call that Ray's own core has for this.
"""

import json
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray._private.state import state

from launcher import lean

AFTER_S = 30.0
"""How long training goes on before a spare is made: the first steps have the processors to themselves."""
KEPT_S = 7 * 24 * 3600
BEGUN_WITHIN_S = 5.0
"""How long a process may take to tell Ray that it is there, before the next one is asked for all the same."""
SIZE = 700 << 20
"""Bytes of host memory that a spare may take, seldom shared: on a CPU 540 MB, with CUDA's libraries more."""
ROOM = 0.1
"""The part of the host's memory that spares leave free."""
HOOK = "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"
"""By this Ray knows what a process runs before its first task (ray._private.ray_constants)."""
KIND = "LAUNCHER_PROCESS"
"""In a process's environment, what it is for: `worker`, or `task`, one that looks ahead or prepares data."""
TASK = ("launcher.describe", "launcher.prepare", "launcher.train.model")
WORKER = (
    "launcher.group",
    "launcher.worker",
    "launcher.stage",
    "launcher.forgetting",
    "launcher.train.engine",
    "launcher.train.model",
    "launcher.train.checkpoint",
    "launcher.train.export",
    "launcher.train.writer",
    "launcher.train.step",
    "launcher.train.usage",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
)


def hook() -> dict[str, str]:
    """Return the part of a job's runtime environment that has its processes `imports`; nothing where users have a hook."""
    return {} if HOOK in os.environ else {"worker_process_setup_hook": "launcher.spare.imports"}


def imports() -> None:
    """Import what this process will need, as Ray calls it in each one that starts: before it is given work."""
    modules = {"worker": WORKER, "task": TASK}.get(os.environ.get(KIND, ""))
    if modules is not None:
        with lean.imports():
            lean.load(modules)


@contextmanager
def ordered(num_beside: int) -> Iterator[None]:
    """Have a spare made on this node, if the block lasts long enough.

    Args:
        num_beside: workers on this node, each of which orders one.
    """
    timer = threading.Timer(AFTER_S, _order, [num_beside])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _order(num_beside: int) -> None:
    import psutil

    memory = psutil.virtual_memory()
    if memory.available - num_beside * SIZE < ROOM * memory.total:
        logging.getLogger(__name__).info("no spare: the host has only %d bytes left", memory.available)
        return
    here = ray.get_runtime_context()
    _ask_raylet(here.get_node_id(), 1, here.get_runtime_env_string())


@dataclass(frozen=True, slots=True)
class Order:
    """Processes to make ready.

    Attributes:
        node: its id.
        num: how many.
        env_vars: of the actors that they are for, beside the job's.
    """

    node: str
    num: int
    env_vars: dict[str, str]


def order(*orders: Order) -> None:
    """Have processes made ready, in this order, without waiting for them."""
    plain = ray.get_runtime_context().get_runtime_env_string()
    job, asked = json.loads(plain), []
    for each in orders:
        # As Ray's core puts a task's environment on its job's (OverrideTaskOrActorRuntimeEnvInfo), where it has one.
        merged = job | {"env_vars": job.get("env_vars", {}) | each.env_vars}
        text = json.dumps(merged, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        asked.append((each.node, each.num, text if each.env_vars else plain))
    threading.Thread(target=_in_turn, args=[asked], daemon=True).start()


@contextmanager
def _never_fails() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # A start or a restart is slower without it, and nothing else.
        logging.getLogger(__name__).warning("no spare process: %s", error)


@_never_fails()
def _in_turn(asked: Sequence[tuple[str, int, str]]) -> None:
    """Ask for processes in turn: a raylet starts as many at once as its node has CPUs, and drops what is above that.

    Args:
        asked: node, number, and environment.
    """
    cpus = {node["NodeID"]: max(1, int(node["Resources"].get("CPU", 1))) for node in ray.nodes()}
    before, begun = len(state.workers()), Counter[str]()
    for node, num, runtime_env in asked:
        room = cpus.get(node, 1)
        while num:
            lot = min(num, max(1, room - begun[node]))
            until_s = time.monotonic() + BEGUN_WITHIN_S
            # Ray's table is not asked for as long as there are CPUs for all.
            while begun[node] >= room and begun[node] - (len(state.workers()) - before) >= room:
                if time.monotonic() >= until_s:
                    break
                time.sleep(0.05)
            _ask_raylet(node, lot, runtime_env)
            begun[node] += lot
            num -= lot


@_never_fails()
def _ask_raylet(node_id: str, num_workers: int, runtime_env: str) -> None:
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import node_manager_pb2, node_manager_pb2_grpc

    node = next(node for node in ray.nodes() if node["NodeID"] == node_id)
    request = node_manager_pb2.PrestartWorkersRequest(
        job_id=bytes.fromhex(ray.get_runtime_context().get_job_id()),
        keep_alive_duration_secs=KEPT_S,
        num_workers=num_workers,
    )
    request.runtime_env_info.serialized_runtime_env = runtime_env
    with init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}") as channel:
        node_manager_pb2_grpc.NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=30)
