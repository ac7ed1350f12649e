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

from launcher.errors import ClusterError


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


def wait_for(fewest: int, most: int, kind: str, limit_s: float, say: Callable[[str], None]) -> int:
    """Wait until the cluster can hold the workers; return how many to start.

    Args:
        fewest: workers to wait for.
        most: workers to start at most.
        kind: the resource of which a worker takes one.
        limit_s: how long to wait.
        say: is told what is waited for, when it changes.

    Raises:
        ClusterError: they are not there in time.
    """
    until_s, said = time.monotonic() + limit_s, -1
    while True:
        there = look(kind, is_probed=True).num_workers
        if there >= fewest:
            return min(there, most)
        if there != said:
            said = there
            say(f"waiting for {fewest} {kind}s: there are {there}; for {limit_s / 60:,.0f} minutes at most")
        if time.monotonic() > until_s:
            raise ClusterError(
                f"the cluster has had {there} {kind}s for {limit_s / 60:,.0f} minutes, and {fewest} are needed:"
                " bring nodes, or start again with fewer --workers; the same command continues"
            )
        time.sleep(0.5)


def _answers(node: dict[str, Any]) -> bool:
    """Whether the node's raylet takes connections."""
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=1).close()
    except OSError:
        return False
    return True
