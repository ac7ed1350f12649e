"""Room for the workers: there already, in use, to come from an autoscaler, or never."""

from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from launcher.autoscaler import NodeType, most, node_types, state
from launcher.plan.plan import World
from launcher.report.findings import Finding


@contextmanager
def asked(world: World) -> Iterator[PlacementGroup]:
    """Ask for the workers' places, as Ray Train does; give them back at the end."""
    group = placement_group([{world.kind: 1}] * world.num_workers, strategy="PACK")
    try:
        yield group
    finally:
        remove_placement_group(group)


def found(world: World, group: PlacementGroup, seconds: float) -> Finding:
    """Return the finding for places that were there.

    Args:
        world: the workers.
        group: which is ready.
        seconds: that it took.
    """
    nodes = list(nodes_of(group).values())
    counts = {node: nodes.count(node) for node in dict.fromkeys(nodes)}
    each = " + ".join(str(count) for count in sorted(counts.values(), reverse=True))
    what = f"{world.num_workers} workers on {len(counts)} node{'s' * (len(counts) > 1)} ({each})"
    return Finding(name="placement", status="ok", what=what, figures={"seconds": seconds, "workers": counts})


def missing(world: World, waited_s: float) -> Finding:
    """Return the finding for places that were not there in time."""
    kind = world.kind
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    there = sum(int(resources.get(kind, 0)) for resources in alive)
    free = int(ray.available_resources().get(kind, 0))
    return verdict(world, there, free, node_types(), list(state().starting), waited_s)


def verdict(
    world: World,
    there: int,
    free: int,
    types: list[NodeType],
    starting: list[str],
    waited_s: float,
) -> Finding:
    """Judge a cluster without room. Pure.

    Args:
        world: the workers that are wanted.
        there: GPUs (or CPUs) of the live nodes.
        free: those that nothing uses.
        types: what an autoscaler may add; empty: nobody says.
        starting: nodes on their way, or why they are not, in words.
        waited_s: how long the workers' places were waited for.
    """
    kind, wanted = f"{world.kind}s", world.num_workers
    figures = {"wanted": wanted, "there": there, "free": free, "starting": starting}
    needs = f"{wanted} workers need {wanted} {kind}, the cluster has {there}"
    if starting:
        needs += f" ({', '.join(starting)})"
    if there >= wanted:
        what = (
            f"{needs}, but only {free} were free within {waited_s:.0f} s: the run will wait until others end"
        )
        return Finding(name="placement", status="warning", what=what, figures=figures)
    limit, names = most(world.kind, there, types)
    figures["most"] = limit
    if types and (limit is None or limit >= wanted):
        what = f"{needs}: the autoscaler can add {names}, and the run waits for them"
        return Finding(name="placement", status="warning", what=what, figures=figures)
    if types:
        what = f"{needs} and can grow to {limit}: use --workers {max(1, limit or 0)}, or raise its maximum"
        return Finding(name="placement", status="failed", what=what, figures=figures)
    if starting:
        what = f"{needs}: the run waits for what is being started"
        return Finding(name="placement", status="warning", what=what, figures=figures)
    what = f"{needs} and no autoscaler that says what it can add: use --workers {max(1, there)}, or add nodes"
    return Finding(name="placement", status="failed", what=what, figures=figures)


def nodes_of(group: PlacementGroup) -> dict[int, str]:
    """Return the node of each place of a group that is ready, sorted by node."""
    table = ray.util.placement_group_table(group)
    places = {int(index): str(node) for index, node in table["bundles_to_node_id"].items()}
    return dict(sorted(places.items(), key=lambda place: (place[1], place[0])))
