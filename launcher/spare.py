"""A process ready beside every worker: it has imported everything, so that a restart of the workers does not wait.

Ray keeps idle processes, and makes an actor in one whose runtime environment is the same. Left alone it has none for
training's environment; each worker asks its raylet for one, by the call that Ray's own core has for this.
"""

import contextlib
import importlib
import json
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated import node_manager_pb2, node_manager_pb2_grpc

AFTER_S = 30.0
"""How long training goes on before a spare is made: the first steps have the processors to themselves."""
KEPT_S = 7 * 24 * 3600
SIZE = 700 << 20
"""Bytes of host memory that a spare may take, seldom shared: on a CPU 540 MB, with CUDA's libraries more."""
ROOM = 0.1
"""The part of the host's memory that spares leave free."""
HOOK = "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"
"""By this Ray knows what a process runs before its first task (ray._private.ray_constants)."""
MODULES = (
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


def environment() -> dict[str, str]:
    """Return what makes a worker's process import everything before it is given work; nothing where users do so."""
    return {} if HOOK in os.environ else {HOOK: "launcher.spare.imports"}


def imports() -> None:
    """Import what a worker needs, as Ray calls it in each process that starts."""
    # A look for GPUs through the driver would settle which there are, before Ray has said which are this worker's.
    with _set("PYTORCH_NVML_BASED_CUDA_CHECK", "1"):
        for module in MODULES:
            # What cannot be imported fails again in the worker, where it is told well.
            with contextlib.suppress(Exception):
                importlib.import_module(module)


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
    memory = psutil.virtual_memory()
    if memory.available - num_beside * SIZE < ROOM * memory.total:
        logging.getLogger(__name__).info("no spare: the host has only %d bytes left", memory.available)
        return
    here = ray.get_runtime_context()
    _ask_raylet(here.get_node_id(), 1, here.get_runtime_env_string())


def order_on(node: str, num_workers: int, env_vars: dict[str, str]) -> None:
    """Have spares made on a node that has just come, without waiting for them.

    Args:
        node: its id.
        num_workers: that will start there.
        env_vars: of the workers, beside the job's.
    """
    # As Ray's core puts a task's environment on its job's (OverrideTaskOrActorRuntimeEnvInfo).
    merged = json.loads(ray.get_runtime_context().get_runtime_env_string())
    merged["env_vars"] = merged.get("env_vars", {}) | env_vars
    text = json.dumps(merged, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    threading.Thread(target=_ask_raylet, args=(node, num_workers, text), daemon=True).start()


def _ask_raylet(node_id: str, num_workers: int, runtime_env: str) -> None:
    try:
        node = next(node for node in ray.nodes() if node["NodeID"] == node_id)
        request = node_manager_pb2.PrestartWorkersRequest(
            job_id=bytes.fromhex(ray.get_runtime_context().get_job_id()),
            keep_alive_duration_secs=KEPT_S,
            num_workers=num_workers,
        )
        request.runtime_env_info.serialized_runtime_env = runtime_env
        with init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}") as channel:
            node_manager_pb2_grpc.NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=30)
    except Exception as error:  # A restart is slower without it, and nothing else.
        logging.getLogger(__name__).warning("no spare process: %s", error)


@contextmanager
def _set(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
