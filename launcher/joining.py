"""Joining the cluster that is meant, or starting one on this machine."""

import contextlib
import functools
import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._private import services

from launcher import capacity, environments, processes, spare
from launcher.capacity import Workers
from launcher.errors import ClusterError, LauncherError, refused_token
from launcher.plan.plan import World
from launcher.spare import Order


@contextmanager
def cluster(
    address: str | None, workers: Workers | None, device: str, wait_s: float, say: Callable[[str], None]
) -> Iterator[World]:
    """Join the cluster that is meant, or start one on this machine, unless that is done; yield the workers to use.

    Args:
        address: of a cluster; None: of the environment, else one is started.
        workers: the fewest and the most; None: all that there are.
        device: gpu, cpu or auto.
        wait_s: how long to wait for an autoscaler's nodes; 0: not at all.
        say: is told what is waited for.

    Raises:
        ClusterError: the cluster cannot be reached, or never can hold the workers, or does not in time.
    """
    if not ray.is_initialized():
        _connect(address, workers[1] if workers else None)
    try:
        yield capacity.world(workers, device, wait_s, say)
    except KeyboardInterrupt:
        # A thread may be waiting inside Ray, which shutting down would crash: the process's end does it.
        raise
    except BaseException:
        ray.shutdown()
        raise
    ray.shutdown()


def begin(address: str | None, workers: Workers | None, device: str) -> None:
    """Join a cluster that is there, and have processes started where there is room, before anything else is looked at.

    Args:
        address, workers, device: as for `cluster`, which is to follow, and which tells what is wrong.

    Raises:
        ClusterError: the cluster cannot be reached.
    """
    _connect(address, None)
    with contextlib.suppress(LauncherError):
        warm_up(capacity.world(workers, device, 0, lambda _: None))


def warm_up(world: World) -> None:
    """Let the processes of a run start, where it is clear on which nodes they will be.

    Args:
        world: the workers.
    """
    here = ray.get_runtime_context().get_node_id()
    orders = [Order(here, 1, environments.of_tasks())]
    nodes = capacity.look(world.kind)
    if len(nodes.workers) == 1 or nodes.num_workers == world.num_workers:
        env_vars = environments.of_workers(on_gpu=world.device == "cuda")
        numbers = {node: min(num_workers, world.num_workers) for node, num_workers in nodes.workers.items()}
        orders += [Order(node, num, env_vars) for node, num in numbers.items() if num]
    # The bulletin.
    spare.order(*orders, Order(here, 1, {}))


@contextmanager
def _in_groups_of_their_own() -> Iterator[None]:
    """Have Ray start its processes apart from this one's group.

    A batch system or a service manager sends SIGTERM to all of a group: the raylet would be gone before the run has saved.
    """
    plain = services.ConsolePopen
    services.ConsolePopen = functools.partial(plain, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = plain


def _connect(address: str | None, num_workers: int | None) -> None:
    logging.getLogger("ray").setLevel(logging.ERROR)
    address = address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    root = Path(__file__).resolve().parent
    in_job = processes.is_of_a_job() or "RAY_JOB_ID" in os.environ
    if address is None and not in_job:
        cpus = os.cpu_count() or 1
        wanted = max(cpus, num_workers or 0)
        environment = {"PYTHONPATH": os.pathsep.join([str(root.parent), os.environ.get("PYTHONPATH", "")])}
        options |= {"address": "local", "num_cpus": wanted, "runtime_env": {"env_vars": environment}}
        # Its raylet would start processes of an environment that no task of ours has.
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
        # Nobody looks at one that goes with the run, and it takes a part of a core.
        options["include_dashboard"] = False
        options["runtime_env"] |= spare.hook()
    else:
        options["address"] = address or "auto"
        options["runtime_env"] = spare.hook()
        if root.parent != Path.cwd() or not in_job:
            # The package travels with the run, so that driver and workers hold the same code.
            options["runtime_env"] |= {"py_modules": [str(root)]}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with _in_groups_of_their_own():
            ray.init(**options)
        # Ray puts a handler of its own in place, which prints a native stack trace over our last words.
        signal.signal(signal.SIGTERM, handler)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        where, reason = options["address"], str(error).splitlines()[0]
        if "InvalidAuthToken" in f"{error}{error.__cause__}":
            raise refused_token(f"the Ray cluster at {where}") from None
        raise ClusterError(f"cannot reach a Ray cluster at {where}: {reason}") from None
