"""The pre-flight: what would go wrong later, asked of the live cluster in less than a minute."""

import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from launcher import bandwidth, placement, probes, storage, verdicts
from launcher.errors import ClusterError, StorageError
from launcher.plan import gpus, offload, zero
from launcher.plan.plan import World
from launcher.report.findings import Finding, Status, finding
from launcher.train import ops

LIMIT_S = 55.0
# Parts of the limit: of the workers' places, of the nodes' looks after them and of their second looks; and
# since the beginning, when ops and links are given up; the rest is for the dry save and load.
_PLACES, _LOOK, _READ, _OPS, _LINKS = 0.18, 0.3, 0.18, 0.6, 0.75
_FOLDER_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the run will do, as far as it can be checked.

    Attributes:
        ds_config: completed, as the plan has it.
        run_root: where runs are kept.
        model_path: a directory, or a hub id; None: there is none.
        step_bytes: what one rank sends (and receives) in a step.
        compute_s: of a step, without communication.
        host_bytes: what the plan needs on a node.
        disk_bytes: what the run will write.
    """

    world: World
    ds_config: dict[str, Any]
    run_root: Path
    model_path: str | None = None
    data_files: tuple[str, ...] = ()
    step_bytes: int | None = None
    compute_s: float | None = None
    host_bytes: int | None = None
    disk_bytes: int | None = None


def check(wanted: Wanted, limit_s: float = LIMIT_S) -> list[Finding]:
    """Check everything on the cluster that Ray is connected to.

    Args:
        wanted: what to check for.
        limit_s: how long all of it may take; what has not answered by then is a finding of its own.

    Raises:
        StorageError: the run root cannot be written by this process.
    """
    start_s, ours = time.monotonic(), probes.versions()
    nodes = _nodes()
    with _folder(wanted.run_root) as folder, placement.asked(wanted.world) as places:
        looks = _look(wanted, nodes, folder, (_PLACES + _LOOK) * limit_s - 2)
        builders = ops.needed(wanted.ds_config)
        builds = _build(wanted, nodes, builders, limit_s)
        is_placed = places.wait(_PLACES * limit_s)
        placed_s = time.monotonic() - start_s
        with bandwidth.linked(wanted.world, places if is_placed else None) as links:
            told = _answers(looks, start_s + (_PLACES + _LOOK) * limit_s, cancel=True)
            answered_s = time.monotonic() - start_s
            reads, skews = _second_look(nodes, told, folder, _READ * limit_s)
            built = _answers(builds, start_s + _OPS * limit_s, cancel=False)
            devices = bandwidth.devices(links, start_s + _OPS * limit_s)
            rates = bandwidth.measure(links, places, wanted.world, start_s + _LINKS * limit_s)
            rehearsed = _rehearsed(
                wanted, links, rates, _by_builder(built, builders), folder, start_s + limit_s
            )
        if is_placed:
            placed = placement.found(wanted.world, places, placed_s)
        else:
            placed = placement.missing(wanted.world, placed_s)
    found = [
        _answered(told, answered_s),
        placed,
        verdicts.versions(told, ours),
        *_judged(wanted, nodes, told, placed.figures.get("workers", {})),
        verdicts.devices(devices) if devices and wanted.world.device == "cuda" else None,
        verdicts.storage(told, reads, str(wanted.run_root)) if reads else None,
        verdicts.ops(_by_builder(built, builders), time.monotonic() - start_s),
        _exchanged(wanted, rates) if is_placed else None,
        verdicts.rehearsal(rehearsed) if rehearsed else None,
        verdicts.clocks(skews) if skews else None,
    ]
    return [each for each in found if each is not None]


def live(limit_s: float = 20.0) -> list[dict[str, Any]]:
    """Return the nodes of the cluster that Ray is connected to, as `plan.cluster.of_live` takes them.

    Raises:
        ClusterError: a node does not answer.
    """
    nodes, here, scratch = _nodes(), ray.get_runtime_context().get_node_id(), tempfile.gettempdir()
    refs = {
        name: _on(node, probes.machine).remote(scratch)
        for name, node in nodes.items()
        if node["NodeID"] != here
    }
    # The driver's own needs no process for that.
    ours = {name: probes.machine(scratch) for name, node in nodes.items() if node["NodeID"] == here}
    found = []
    for name, machine in (ours | _answers(refs, time.monotonic() + limit_s, cancel=True)).items():
        if "cores" not in machine:
            raise ClusterError(f"node {name} gave no answer within {limit_s:g} s: is it alive and reachable?")
        resources, found_gpus = nodes[name]["Resources"], machine["gpus"]
        found.append(
            {
                "num_gpus": int(resources.get("GPU", 0)),
                "num_cpus": int(resources.get("CPU", 0)),
                "gpu_name": found_gpus[0]["name"]
                if found_gpus
                else next(iter(gpus.names_in(resources)), None),
                "gpu_bytes": min((gpu["bytes"] for gpu in found_gpus), default=None),
                "host_bytes": machine["host_bytes"],
                "disk_bytes": min(machine["disks"].values()),
            }
        )
    return found


def _judged(
    wanted: Wanted, nodes: dict[str, Any], told: dict[str, Any], workers: dict[str, int]
) -> list[Finding | None]:
    """Judge what the nodes have told; of those that told nothing another finding says so."""
    told = {name: answer for name, answer in told.items() if answer and "lost" not in answer}
    if not told:
        return []
    gpus_of = {name: int(node["Resources"].get("GPU", 0)) for name, node in nodes.items()}
    return [
        verdicts.processors(
            told,
            gpus_of if wanted.world.device == "cuda" else {},
            {name: workers.get(node["NodeID"], 0) for name, node in nodes.items()},
        ),
        verdicts.memory(told, wanted.host_bytes),
        verdicts.disks(told, wanted.disk_bytes, str(wanted.run_root)),
        verdicts.scratch(told),
        verdicts.readable("model", told),
        verdicts.readable("data", told),
    ]


def _by_builder(built: dict[str, Any], builders: tuple[str, ...]) -> dict[str, Any]:
    """By node, by builder, its answer; empty where there is none yet."""
    results = {}
    for node, answer in built.items():
        lost = {"op": "ops", "error": f"the process that builds died: {answer.get('lost')}"}
        results[node] = answer.get("builds") or {each: lost if "lost" in answer else {} for each in builders}
    return results


def _nodes() -> dict[str, dict[str, Any]]:
    """The live nodes by a name for people: the address, with a part of the id where several share one."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    addresses = [node["NodeManagerAddress"] for node in alive]
    return {
        address if addresses.count(address) == 1 else f"{address}#{node['NodeID'][-4:]}": node
        for address, node in zip(addresses, alive, strict=True)
    }


@contextmanager
def _folder(run_root: Path) -> Iterator[Path]:
    folder = run_root / f".preflight-{uuid.uuid4().hex[:8]}"

    def make() -> dict[str, Any]:
        storage.make_directory(folder)
        return {}

    if error := probes.within(_FOLDER_S, make).get("error"):
        raise StorageError(str(error))
    try:
        yield folder
    finally:

        def delete() -> dict[str, Any]:
            storage.delete(folder)
            return {}

        probes.within(_FOLDER_S, delete)


def _on(node: dict[str, Any], function: Callable[..., Any], **options: Any) -> Any:
    """A task for one node, which waits for nobody's CPUs."""
    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    # Not tried again: a node that loses a task of a few seconds is itself the finding.
    return ray.remote(  # type: ignore[call-overload]
        num_cpus=0, max_retries=0, scheduling_strategy=there, **options
    )(function)


def _look(wanted: Wanted, nodes: dict[str, dict[str, Any]], folder: Path, limit_s: float) -> dict[str, Any]:
    asked = probes.Look(
        run_root=str(wanted.run_root),
        folder=str(folder),
        model_path=wanted.model_path,
        data_files=wanted.data_files,
        scratch=tuple(dict.fromkeys(offload.disks(wanted.ds_config).values())),
        limit_s=limit_s,
    )
    return {name: _on(node, probes.look).remote(asked, _file(name)) for name, node in nodes.items()}


def _second_look(
    nodes: dict[str, Any], told: dict[str, Any], folder: Path, limit_s: float
) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """Let the driver read every node's file, and every node the next one's; look at the clocks.

    Returns:
        By reader what it read, and by how much at least each node's clock is ahead of the driver's.
    """
    written = {name: answer.get("storage", {}).get("digest") for name, answer in told.items()}
    names = [name for name, digest in written.items() if digest]
    next_of = {name: other for name, other in zip(names, names[1:] + names[:1], strict=True) if name != other}
    asked_at, until_s = time.time(), time.monotonic() + limit_s
    refs = {}
    for name, node in nodes.items():
        other = next_of.get(name)
        what = (str(folder / _file(other)), written[other]) if other else None
        refs[name] = _on(node, probes.second_look).remote(what)
    reads: dict[str, dict[str, Any]] = {}
    for name in names:
        answer = probes.within(
            max(0.1, until_s - time.monotonic()), probes.read, str(folder / _file(name)), written[name]
        )
        if "driver" not in reads or "error" in answer:
            reads["driver"] = answer | {"writer": name}
    skews = {}
    for name, answer in _answers(refs, until_s, cancel=True).items():
        if "time" in answer:
            # What the way there and back allows is no difference.
            skews[name] = max(0.0, answer["time"] - time.time()) or min(answer["time"] - asked_at, 0.0)
        if name in next_of:
            read = answer.get("read") or {"error": f"no answer within {limit_s:g} s"}
            reads[f"node {name}"] = read | {"writer": next_of[name]}
    return reads, skews


def _build(
    wanted: Wanted, nodes: dict[str, Any], builders: tuple[str, ...], limit_s: float
) -> dict[str, Any]:
    if not builders:
        return {}
    kind = wanted.world.kind
    return {
        # A process that has loaded ops is of no other use.
        name: _on(node, ops.build_all, max_calls=1).remote(
            builders, wanted.world.device, 0.9 * _OPS * limit_s
        )
        for name, node in nodes.items()
        if node["Resources"].get(kind)
    }


def _answers(refs: dict[str, Any], until_s: float, *, cancel: bool) -> dict[str, dict[str, Any]]:
    """What each task said; empty where it said nothing in time or died, and then it is ended if asked."""
    if not refs:
        return {}
    ready, _ = ray.wait(
        list(refs.values()), num_returns=len(refs), timeout=max(0.1, until_s - time.monotonic())
    )
    answers: dict[str, dict[str, Any]] = {name: {} for name in refs}
    for name, ref in refs.items():
        if ref in ready:
            try:
                answers[name] = ray.get(ref)
            except ray.exceptions.RayError as error:
                answers[name] = {"lost": str(error).strip().splitlines()[-1][:200]}
        elif cancel:
            ray.cancel(ref, force=True)
    return answers


def _exchanged(wanted: Wanted, rates: dict[str, Any]) -> Finding:
    step, on_gpu = (wanted.step_bytes, wanted.compute_s), wanted.world.device == "cuda"
    return verdicts.bandwidth(rates, zero.zero_stage(wanted.ds_config), on_gpu, step)


def _rehearsed(
    wanted: Wanted,
    links: list[Any],
    rates: dict[str, Any],
    built: dict[str, dict[str, Any]],
    folder: Path,
    until_s: float,
) -> dict[str, Any]:
    """Save and load step 0 with the ranks that have met; empty where they have not, or an op is not there yet."""
    answers = [answer for by_op in built.values() for answer in by_op.values()]
    has_ops = all(answer and not answer.get("error") and not answer.get("late") for answer in answers)
    if not rates or "error" in rates or not has_ops:
        return {}
    return bandwidth.rehearse(links, wanted.ds_config, str(folder / "step-0"), until_s)


def _answered(told: dict[str, dict[str, Any]], seconds: float) -> Finding:
    said: list[tuple[Status, str]] = [
        (
            "failed",
            f"{name}: {answer.get('lost') or f'no answer within {seconds:.0f} s'}: is it alive and not overloaded?",
        )
        for name, answer in told.items()
        if not answer or "lost" in answer
    ]
    return finding("nodes", said, f"{len(told)} answered within {seconds:.0f} s", {"nodes": list(told)})


def _file(node: str) -> str:
    return node.replace("#", "-").replace(":", "-")
