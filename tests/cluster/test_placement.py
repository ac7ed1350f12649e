"""Each documented job against the nodes of its cluster file: by Ray's own scheduler, and by the launcher's verdict."""

from functools import partial
from typing import Any

import pytest
from ray.autoscaler._private.node_provider_availability_tracker import NodeAvailabilitySummary
from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer, get_nodes_for

from launcher.placement import NodeType, verdict
from launcher.plan.plan import World
from tests.cluster.files import CLOUDS, Job, autoscaling, job, of_kind, prepared, slurm, submitted

STANDING = [each for each in submitted() if each.place == "Start, submit, stop"]
ON_KUBERNETES = [each for each in submitted() if each.place == "Kubernetes"]


def entrypoint(name: str, manifest: dict[str, Any]) -> Job:
    """Return the job of a RayJob."""
    found = job(name, manifest["spec"]["entrypoint"].split())
    assert found
    return found


def cases() -> list[tuple[str, dict[str, Any], Job]]:
    """Return every documented job with the config of each cluster that it may be sent to."""
    found = [(name, prepared(name), each) for name in CLOUDS for each in STANDING]
    for name, manifest in of_kind("RayCluster", "RayJob"):
        jobs = ON_KUBERNETES if manifest["kind"] == "RayCluster" else [entrypoint(name, manifest)]
        found += [(name, autoscaling(manifest), each) for each in jobs]
    return found


CASES = cases()
IDS = [f"{name}-{each.fewest}-{each.most}" for name, _, each in CASES]


def node_types(config: dict[str, Any]) -> list[NodeType]:
    """Return the types that an autoscaler may add, the head's left out."""
    return [
        NodeType(name=name, most=kind["max_workers"], resources=kind["resources"])
        for name, kind in config["available_node_types"].items()
        if name != config["head_node_type"]
    ]


def world(workers: int) -> World:
    return World(num_workers=workers, device="cuda")


def chosen(config: dict[str, Any], workers: int) -> tuple[dict[str, int], list[Any]]:
    """Return what Ray's scheduler would start for so many workers with a GPU each, and whom it cannot place."""
    nodes, rest = get_nodes_for(
        config["available_node_types"],
        {},
        config["head_node_type"],
        config["max_workers"],
        [{"GPU": 1}] * workers,
        partial(_default_utilization_scorer, node_availability_summary=NodeAvailabilitySummary({})),
    )
    return dict(nodes), rest


def test_there_are_documented_jobs_for_every_cluster() -> None:
    assert len(STANDING) >= 2 and ON_KUBERNETES and slurm()
    assert any(each.fewest < each.most for each in STANDING)


@pytest.mark.parametrize(("_", "config", "each"), CASES, ids=IDS)
def test_ray_starts_nodes_of_one_type_for_all_workers(_: str, config: dict[str, Any], each: Job) -> None:
    for workers in (each.fewest, each.most):
        nodes, rest = chosen(config, workers)
        assert not rest, f"{len(rest)} of {workers} workers have no place"
        assert len(nodes) == 1, f"half of one kind and half of another: {nodes}"
        (kind,) = nodes
        assert config["available_node_types"][kind]["resources"]["GPU"] == 8


@pytest.mark.parametrize(("_", "config", "each"), CASES, ids=IDS)
def test_one_type_alone_can_hold_all_workers(_: str, config: dict[str, Any], each: Job) -> None:
    """Neither spot machines alone nor those on demand may have to be filled up by the other."""
    enough = {
        kind.name
        for kind in node_types(config)
        if (kind.most or 0) * kind.resources.get("GPU", 0) >= each.most
    }
    named = {name.removesuffix("-spot") for name in enough}
    assert enough, "no type alone is enough"
    if any(name.endswith("-spot") for name in config["available_node_types"]):
        assert enough == named | {f"{name}-spot" for name in named}


@pytest.mark.parametrize(("_", "config", "each"), CASES, ids=IDS)
def test_the_launcher_says_that_they_will_come(_: str, config: dict[str, Any], each: Job) -> None:
    assert verdict(world(each.most), 0, 0, node_types(config), [], 5).status == "warning"


@pytest.mark.parametrize("name", CLOUDS)
def test_what_cannot_come_is_said(name: str) -> None:
    config = prepared(name)
    for kind in config["available_node_types"].values():
        kind["max_workers"] = min(1, kind["max_workers"])
    found = verdict(world(64), 0, 0, node_types(config), [], 5)
    assert found.status == "failed" and "can grow to" in found.what
    assert chosen(config, 64)[1]


@pytest.mark.parametrize("name", CLOUDS)
def test_spot_machines_come_first_and_others_take_their_place(name: str) -> None:
    config = prepared(name)
    assert set(chosen(config, 8)[0]) == {"h100x8-spot"}
    config["available_node_types"]["h100x8-spot"]["max_workers"] = 0
    assert set(chosen(config, 8)[0]) == {"h100x8"}


@pytest.mark.parametrize("name", CLOUDS)
def test_rows_become_tokens_on_a_node_without_gpus(name: str) -> None:
    config = prepared(name)
    nodes, rest = get_nodes_for(
        config["available_node_types"],
        {},
        config["head_node_type"],
        config["max_workers"],
        [{"CPU": 1}] * 8,
        partial(_default_utilization_scorer, node_availability_summary=NodeAvailabilitySummary({})),
    )
    assert dict(nodes) == {"cpu": 1} and not rest


def test_the_slurm_jobs_have_as_many_gpus_as_workers() -> None:
    from tests.cluster.files import CLUSTER, commands, text_of

    script = text_of(CLUSTER / "slurm" / "ray.sbatch")
    assert "#SBATCH --gpus-per-node=8" in script
    for command, each in zip(commands("sbatch"), slurm(), strict=True):
        nodes = next(word for word in command.words if word.startswith("--nodes="))
        assert each.most == 8 * int(nodes.removeprefix("--nodes="))
