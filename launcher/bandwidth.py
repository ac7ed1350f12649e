"""The collectives' speed on the live cluster, in the places where the workers will be."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from launcher import placement
from launcher.plan.plan import World

if TYPE_CHECKING:
    from launcher.links import Rates


@contextmanager
def linked(world: World, places: PlacementGroup | None) -> Iterator[list[Any]]:
    """One process for each rank, in the workers' places; none where there is no room."""
    if places is None:
        yield []
        return
    from launcher.links import Link  # torch: only where a pre-flight is made

    kind = "num_gpus" if world.device == "cuda" else "num_cpus"
    links: list[Any] = [
        ray.remote(Link)
        .options(
            **{kind: 1},
            scheduling_strategy=PlacementGroupSchedulingStrategy(places, placement_group_bundle_index=index),
        )
        .remote()
        for index in placement.nodes_of(places)
    ]
    try:
        yield links
    finally:
        for link in links:
            ray.kill(link)


def devices(links: list[Any], until_s: float) -> list[dict[str, Any]]:
    """Return what torch sees on each rank; empty where there is no answer in time."""
    asked = [link.device.remote() for link in links]
    try:
        return list(ray.get(asked, timeout=max(1, until_s - time.monotonic())))
    except (ray.exceptions.RayError, TimeoutError):
        return []


def measure(links: list[Any], places: PlacementGroup, world: World, until_s: float) -> dict[str, Any]:
    """Let the ranks exchange tensors.

    Args:
        links: of `linked`.
        places: where they are.
        world: the workers.
        until_s: on the monotonic clock, when to give up.

    Returns:
        `links.Rates`, of each group the slowest rank's; or `{"error": one line}`.
    """
    from launcher.links import Meeting

    if len(links) < 2:
        return {}
    node_of = list(placement.nodes_of(places).values())
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    try:
        port = ray.get(links[0].free_port.remote(), timeout=max(1, until_s - time.monotonic()))
        meeting = Meeting(
            address=addresses[node_of[0]],
            port=port,
            backend="nccl" if world.device == "cuda" else "gloo",
            nodes=tuple(list(dict.fromkeys(node_of)).index(node) for node in node_of),
            limit_s=max(2.0, until_s - time.monotonic() - 1),
        )
        asked = [link.measure.remote(rank, meeting) for rank, link in enumerate(links)]
        return _slowest(ray.get(asked, timeout=max(1, until_s - time.monotonic())))
    except (ray.exceptions.RayError, TimeoutError) as error:
        return {"error": str(error).strip().splitlines()[-1][:200]}


def rehearse(links: list[Any], ds_config: dict[str, Any], folder: str, until_s: float) -> dict[str, Any]:
    """Let the ranks that have met save and load step 0; return the slowest one's seconds, or `{"error": one line}`.

    Args:
        links: of `linked`, after `measure`.
        ds_config: completed.
        folder: to save to.
        until_s: on the monotonic clock, when to give up.
    """
    asked = [link.rehearse.remote(ds_config, folder) for link in links]
    left_s = max(1.0, until_s - time.monotonic())
    try:
        return {"seconds": max(ray.get(asked, timeout=left_s))}
    except ray.exceptions.GetTimeoutError:
        return {"error": f"no end within {left_s:.0f} s"}
    except (ray.exceptions.RayError, TimeoutError) as error:
        return {"error": str(error).strip().splitlines()[-1][:200]}


def _slowest(rates: list[Rates]) -> Rates:
    """Of all ranks, the least rate of each group, collective and size."""
    least: Rates = {}
    for found in rates:
        for group, collectives in found.items():
            for name, by_size in collectives.items():
                known = least.setdefault(group, {}).setdefault(name, {})
                for size, rate in by_size.items():
                    known[size] = min(rate, known.get(size, rate))
    return least
