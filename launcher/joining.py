"""Joining the cluster that is meant, or starting one on this machine."""

import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from launcher import capacity, processes
from launcher.capacity import Workers
from launcher.errors import ClusterError, refused_token
from launcher.plan.plan import World


@contextmanager
def cluster(
    address: str | None, workers: Workers | None, device: str, wait_s: float, say: Callable[[str], None]
) -> Iterator[World]:
    """Join the cluster that is meant, or start one on this machine; yield the workers to use.

    Args:
        address: of a cluster; None: of the environment, else one is started.
        workers: the fewest and the most; None: all that there are.
        device: gpu, cpu or auto.
        wait_s: how long to wait for an autoscaler's nodes; 0: not at all.
        say: is told what is waited for.

    Raises:
        ClusterError: the cluster cannot be reached, or never can hold the workers, or does not in time.
    """
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
        # Nobody looks at one that goes with the run, and it takes a part of a core.
        options["include_dashboard"] = False
    else:
        options["address"] = address or "auto"
        if root.parent != Path.cwd() or not in_job:
            # The package travels with the run, so that driver and workers hold the same code.
            options["runtime_env"] = {"py_modules": [str(root)]}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
        # Ray puts a handler of its own in place, which prints a native stack trace over our last words.
        signal.signal(signal.SIGTERM, handler)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        where, reason = options["address"], str(error).splitlines()[0]
        if "InvalidAuthToken" in f"{error}{error.__cause__}":
            raise refused_token(f"the Ray cluster at {where}") from None
        raise ClusterError(f"cannot reach a Ray cluster at {where}: {reason}") from None
