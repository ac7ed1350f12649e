"""Room for the workers: there already, in use, to come from an autoscaler, or never."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray
import yaml
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from launcher.plan.plan import World
from launcher.report.findings import Finding

BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")
"""Where `ray up` leaves a cluster's config, on its head node."""
_STATUS_S = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeType:
    """A kind of node that an autoscaler can add."""

    name: str
    most: int | None
    """None: as many as are wanted."""
    resources: Mapping[str, float]


@contextmanager
def asked(world: World) -> Iterator[PlacementGroup]:
    """Ask for the workers' places, as Ray Train does; give them back at the end."""
    group = placement_group([{_kind(world): 1}] * world.num_workers, strategy="PACK")
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
    kind = _kind(world)
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    there = sum(int(resources.get(kind, 0)) for resources in alive)
    free = int(ray.available_resources().get(kind, 0))
    return verdict(world, there, free, node_types(), launching(), waited_s)


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
    kind, wanted = f"{_kind(world)}s", world.num_workers
    figures = {"wanted": wanted, "there": there, "free": free, "starting": starting}
    needs = f"{wanted} workers need {wanted} {kind}, the cluster has {there}"
    if starting:
        needs += f" ({', '.join(starting)})"
    if there >= wanted:
        what = (
            f"{needs}, but only {free} were free within {waited_s:.0f} s: the run will wait until others end"
        )
        return Finding(name="placement", status="warning", what=what, figures=figures)
    most, names = _most(_kind(world), there, types)
    figures["most"] = most
    if types and (most is None or most >= wanted):
        what = f"{needs}: the autoscaler can add {names}, and the run waits for them"
        return Finding(name="placement", status="warning", what=what, figures=figures)
    if types:
        what = f"{needs} and can grow to {most}: use --workers {max(1, most or 0)}, or raise its maximum"
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


def node_types(bootstrap: Path = BOOTSTRAP) -> list[NodeType]:
    """Return what an autoscaler may add, as the cluster or its config file says; empty: nobody says."""
    config = ray._private.state.state.get_cluster_config()
    if config is not None and config.node_group_configs:
        return [
            NodeType(
                name=group.name,
                most=None if group.max_count < 0 else group.max_count,
                resources={key: float(value) for key, value in group.resources.items()},
            )
            for group in config.node_group_configs
        ]
    try:
        given = yaml.safe_load(bootstrap.expanduser().read_text(encoding="utf-8"))
        most = int(given.get("max_workers", 2))
        return [
            NodeType(
                name=name,
                most=1 if name == given.get("head_node_type") else int(kind.get("max_workers", most)),
                resources=kind.get("resources") or {},
            )
            for name, kind in given["available_node_types"].items()
        ]
    except (OSError, yaml.YAMLError, KeyError, AttributeError, ValueError):
        return []


def launching() -> list[str]:
    """Return the nodes that an autoscaler is starting, and why it could not start others, in words."""
    from ray.autoscaler.v2.sdk import get_cluster_status

    said = []
    try:
        status = get_cluster_status(ray.get_runtime_context().gcs_address, timeout=_STATUS_S)
        said += [f"starting {each.count} x {each.ray_node_type_name}" for each in status.pending_launches]
        said += [f"starting {each.ray_node_type_name}" for each in status.pending_nodes]
        said += [f"{each.ray_node_type_name}: {each.details}" for each in status.failed_launches[-1:]]
    except Exception:  # An autoscaler of the first kind, or none: it says nothing there.
        said = []
    key = ray._private.ray_constants.DEBUG_AUTOSCALING_STATUS.encode()
    if not said and (raw := ray.experimental.internal_kv._internal_kv_get(key)):
        report = json.loads(raw).get("autoscaler_report") or {}
        said += [
            f"starting {count} x {name}" for name, count in (report.get("pending_launches") or {}).items()
        ]
        said += [f"starting {node[1]}" for node in report.get("pending_nodes") or []]
    return said


def _most(kind: str, there: int, types: list[NodeType]) -> tuple[int | None, str]:
    """The most GPUs or CPUs that there can be, and the types that have them."""
    useful = [each for each in types if each.resources.get(kind)]
    names = ", ".join(
        f"{each.name} (up to {'any number' if each.most is None else each.most})" for each in useful
    )
    if any(each.most is None for each in useful):
        return None, names
    return max(there, sum(int(each.resources[kind]) * (each.most or 0) for each in useful)), names


def _kind(world: World) -> str:
    return "GPU" if world.device == "cuda" else "CPU"
