"""What an autoscaler can add, is adding, and says that it never can."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import yaml
from ray._raylet import GcsClient
from ray.autoscaler._private.util import format_readonly_node_type
from ray.core.generated import autoscaler_pb2
from ray.util.placement_group import placement_group, remove_placement_group

BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")
"""Where `ray up` leaves a cluster's config, on its head node."""
AT_ONCE = 64
"""Places asked for one by one, at most: Ray looks at each of them again and again."""
_STATUS_S = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeType:
    """A kind of node that an autoscaler can add."""

    name: str
    most: int | None
    """None: as many as are wanted."""
    resources: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class State:
    """What an autoscaler is about.

    Attributes:
        is_there: whether there is one.
        starting: nodes on their way, and why the last one failed, in words.
        never: numbers of places that it was asked for at once and cannot bring.
    """

    is_there: bool = False
    starting: tuple[str, ...] = ()
    never: frozenset[int] = frozenset()


@contextmanager
def demand(kind: str, num_places: int, *, is_gang: bool) -> Iterator[None]:
    """Ask for places, so that an autoscaler brings nodes, until the block ends or this process does.

    Args:
        kind: the resource of which each place has one: GPU or CPU.
        num_places: none is asked for where it is 0.
        is_gang: whether some of them are of no use without the others.
    """
    sizes = [1] * min(num_places, AT_ONCE)
    if is_gang and num_places:
        sizes = [num_places]
    groups = [placement_group([{kind: 1}] * size, strategy="PACK") for size in sizes]
    try:
        yield
    finally:
        for group in groups:
            remove_placement_group(group)


def state() -> State:
    """Return what the autoscaler of the cluster that Ray is connected to is about."""
    found = _of_version_2()
    return found if found.is_there else _of_version_1()


def node_types(bootstrap: Path = BOOTSTRAP) -> list[NodeType]:
    """Return what an autoscaler may add, as the cluster or its config file says; empty: nobody says."""
    config = ray._private.state.state.get_cluster_config() if ray.is_initialized() else None
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


def most(kind: str, there: int, types: Iterable[NodeType]) -> tuple[int | None, str]:
    """Return the most GPUs or CPUs that there can be (None: no limit), and the types that have them, in words. Pure.

    Args:
        kind: GPU or CPU.
        there: of the live nodes.
        types: what may be added.
    """
    # Of machines of one's own, `ray up` does not know what they have.
    useful = [each for each in types if each.resources.get(kind) or not each.resources]
    names = ", ".join(
        f"{each.name} (up to {'any number' if each.most is None else each.most})" for each in useful
    )
    if any(each.most is None or not each.resources for each in useful):
        return None, names
    return max(there, sum(int(each.resources[kind]) * (each.most or 0) for each in useful)), names


def told(types: Iterable[NodeType]) -> str:
    """Return node types with what each has, in words. Pure."""

    def has(each: NodeType) -> str:
        return ", ".join(f"{value:g} {key}" for key, value in each.resources.items() if key in ("CPU", "GPU"))

    return "; ".join(f"{each.name} has {has(each) or 'neither CPUs nor GPUs'}" for each in types)


def _of_version_2() -> State:
    address = ray.get_runtime_context().gcs_address
    try:
        reply = autoscaler_pb2.GetClusterStatusReply()
        reply.ParseFromString(GcsClient(address=address).get_cluster_status(timeout_s=_STATUS_S))
    except (ray.exceptions.RpcError, ray.exceptions.RaySystemError):
        return State()
    found: Any = reply.autoscaling_state
    if not found.autoscaler_state_version:
        return State()
    starting = [
        f"starting {each.count} x {each.ray_node_type_name}" for each in found.pending_instance_requests
    ]
    starting += [f"starting {each.ray_node_type_name}" for each in found.pending_instances]
    starting += [f"{each.ray_node_type_name}: {each.reason}" for each in found.failed_instance_requests[-1:]]
    never = {_num_places(each) for each in found.infeasible_gang_resource_requests}
    return State(is_there=True, starting=tuple(starting), never=frozenset(never))


def _num_places(request: Any) -> int:
    return sum(len(each.resource_requests) for each in request.bundle_selectors) or len(request.requests)


def _only_watches(nodes: Mapping[str, str]) -> bool:
    """Whether an autoscaler without a config shows what others started: it makes up a type for each node."""
    return all(name == format_readonly_node_type(node) for node, name in nodes.items())


def _of_version_1() -> State:
    key = ray._private.ray_constants.DEBUG_AUTOSCALING_STATUS.encode()
    raw = ray.experimental.internal_kv._internal_kv_get(key)
    if not raw:
        return State()
    report = json.loads(raw).get("autoscaler_report") or {}
    if _only_watches(report.get("node_type_mapping") or {}):
        return State()
    starting = [
        f"starting {count} x {name}" for name, count in (report.get("pending_launches") or {}).items()
    ]
    starting += [f"starting {node[1]}" for node in report.get("pending_nodes") or []]
    return State(is_there=True, starting=tuple(starting))
