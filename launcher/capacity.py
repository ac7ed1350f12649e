"""How many workers the live nodes can hold, and which nodes are about to go."""

import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions
from ray._private.state import state as cluster_state

from launcher import autoscaler
from launcher.errors import BadInput, ClusterError
from launcher.plan import gpus
from launcher.plan.plan import World

Workers = tuple[int, int]
"""The fewest and the most workers to run with."""
DEVICES = ("auto", "gpu", "cpu")
REFUSALS = 6
"""Looks in a row, half a second apart, at which an autoscaler says that it cannot, until it is believed."""


@dataclass(frozen=True, slots=True)
class Nodes:
    """The cluster at a moment.

    Attributes:
        workers: by node id, how many workers fit there; of nodes that are alive and stay.
        draining: ids of nodes that are about to go.
    """

    workers: dict[str, int]
    draining: frozenset[str]

    @property
    def num_workers(self) -> int:
        """How many workers fit in all."""
        return sum(self.workers.values())


def look(kind: str, *, is_probed: bool = False) -> Nodes:
    """Return what the cluster is now.

    Args:
        kind: the resource of which a worker takes one: GPU or CPU.
        is_probed: whether to ask each node whether it answers; Ray notices only after some seconds that one is gone.
    """
    draining = frozenset(cluster_state.get_draining_nodes() or {})
    alive = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]
    if is_probed:
        with ThreadPoolExecutor(min(64, len(alive)) or 1) as pool:
            alive = [node for node, answers in zip(alive, pool.map(_answers, alive), strict=True) if answers]
    return Nodes({node["NodeID"]: int(node["Resources"].get(kind, 0)) for node in alive}, draining)


def num_gone(nodes: set[str]) -> int:
    """Return how many of these nodes are there no more; 0 where the cluster does not answer."""
    try:
        return len(nodes - {node["NodeID"] for node in ray.nodes() if node["Alive"]})
    except (ray.exceptions.RayError, ConnectionError, RuntimeError):
        return 0


def world(workers: Workers | None, device: str, wait_s: float, say: Callable[[str], None]) -> World:
    """Return the workers to begin with, when there is a place for them.

    Args:
        workers: the fewest and the most; None: all that there are.
        device: gpu or cpu, or auto: GPUs where there are some, or the node types that are known have some.
        wait_s: how long to wait for an autoscaler's nodes; 0: not at all.
        say: is told what is waited for.

    Raises:
        BadInput: there is no such device.
        ClusterError: there never can be so many, or are not in time.
    """
    if device not in DEVICES:
        raise BadInput(f"LAUNCHER_DEVICE={device}: has to be {', '.join(DEVICES)}")
    kind = _kind() if device == "auto" else device.upper()
    there = look(kind).num_workers
    can_grow = autoscaler.state().is_there or bool(autoscaler.node_types())
    if workers is None and there == 0:
        raise ClusterError(
            f"the cluster has no {kind}s yet; its autoscaler can add them: say how many with --workers"
            if can_grow
            else "the cluster has neither CPUs nor GPUs to run workers on"
        )
    fewest, most = workers or (1, there if kind == "GPU" else min(2, there))
    if fewest > there and not can_grow:
        raise ClusterError(f"--workers {fewest}, but the cluster has {there} {kind}s: ask for at most that")
    if fewest > there and not wait_s:
        raise ClusterError(
            f"--workers {fewest}, but the cluster has {there} {kind}s yet: --cluster, as in 2x8xH100-80GB, plans"
            " without them"
        )
    there = wait_for(fewest, most, kind, wait_s, say)
    names = {name for node in ray.nodes() if node["Alive"] for name in gpus.names_in(node["Resources"])}
    return World(num_workers=there, device="cuda" if kind == "GPU" else "cpu", half=gpus.half(names))


def wait_for(fewest: int, most: int, kind: str, limit_s: float, say: Callable[[str], None]) -> int:
    """Wait until the cluster can hold the workers, asking its autoscaler for them; return how many to start.

    Args:
        fewest: workers to wait for.
        most: workers to start at most.
        kind: the resource of which a worker takes one.
        limit_s: how long to wait.
        say: is told what is waited for, when it changes.

    Raises:
        ClusterError: they are not there in time, or never can be.
    """
    there = look(kind, is_probed=True).num_workers
    if there >= fewest:
        return min(there, most)
    until_s, said, num_refused = time.monotonic() + limit_s, "", 0
    _check_possible(fewest, kind, there)
    with autoscaler.demand(kind, fewest, is_gang=True):
        while there < fewest:
            state = autoscaler.state()
            doing = (
                "the autoscaler has been asked" if state.is_there else "no autoscaler is here to add nodes"
            )
            doing = f"the autoscaler: {', '.join(state.starting)}" if state.starting else doing
            if doing != said:
                said = doing
                say(f"{there} of {fewest} {kind} workers have a place; {doing}")
            # An autoscaler that looks while nodes come and go may be wrong once.
            num_refused = num_refused + 1 if fewest in state.never else 0
            if num_refused >= REFUSALS:
                raise ClusterError(
                    f"--workers {fewest}: the autoscaler cannot bring {fewest} {kind}s"
                    f"{_types()}: ask for fewer, or raise its maximum"
                )
            if time.monotonic() > until_s:
                raise ClusterError(
                    f"the cluster has had {there} {kind}s for {limit_s / 60:,.0f} minutes, and {fewest} are needed"
                    f" ({doing}): bring nodes, wait longer (--wait), or start again with fewer --workers; the same"
                    " command continues"
                )
            time.sleep(0.5)
            there = look(kind, is_probed=True).num_workers
    return min(there, most)


def _kind() -> str:
    """Return the resource of which a worker takes one: GPU where there are any, or can be; else CPU."""
    there = ray.cluster_resources().get("GPU", 0)
    can_be = any(each.resources.get("GPU") and each.most != 0 for each in autoscaler.node_types())
    return "GPU" if there or can_be else "CPU"


def _check_possible(fewest: int, kind: str, there: int) -> None:
    """Raise where the node types say that there never can be so many."""
    types = autoscaler.node_types()
    limit, _ = autoscaler.most(kind, there, types)
    if types and limit is not None and limit < fewest:
        raise ClusterError(
            f"--workers {fewest}, each with a {kind}: the cluster has {there} and can grow to {limit}"
            f"{_types()}: ask for at most that, or raise the types' maximum"
        )


def _types() -> str:
    types = autoscaler.node_types()
    return f" ({autoscaler.told(types)})" if types else ""


def _answers(node: dict[str, Any]) -> bool:
    """Whether the node's raylet takes connections."""
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=1).close()
    except OSError:
        return False
    return True
