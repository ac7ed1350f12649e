"""What is said before a run begins: the forecast for its machines, and the pre-flight on them."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from launcher import environments, outlook, preflight, probes, storage
from launcher import recipe as recipes
from launcher.errors import ClusterError, LauncherError
from launcher.outlook import Outlook
from launcher.plan import cluster as clusters
from launcher.plan import forecast, zero
from launcher.plan import plan as planning
from launcher.plan.cluster import Cluster
from launcher.plan.plan import ModelFacts, Plan, StageFacts, World
from launcher.recipe import Recipe
from launcher.report import findings
from launcher.report import summary as report

PLAN, PREFLIGHT = "plan.json", "preflight.json"
ASKED = "plan-asked.json"
"""A forecast that was asked for beside a run that has begun: what the run itself goes by stays in PLAN."""
CONFIGS = Path(__file__).resolve().parent.parent / "ds_configs"
LONG_S = 1800
"""A run that is expected to take longer begins with a pre-flight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the command line resolved to.

    Attributes:
        ds_config: None: to be chosen.
        num_workers: the fewest; None: as many as there are.
        price: dollars an hour of one node; None: unknown.
    """

    recipe: Recipe
    ds_name: str
    ds_config: dict[str, Any] | None
    model_facts: ModelFacts
    facts: tuple[StageFacts, ...]
    num_workers: int | None
    price: float | None = None

    def arguments(self, cluster: Cluster) -> tuple[Any, ...]:
        """Return what `outlook.look` takes: plain data."""
        configs = outlook.shipped(CONFIGS)
        tree = recipes.dump(self.recipe)
        return (tree, self.ds_name, self.ds_config, configs, self.model_facts, self.facts, cluster)

    def plan(self, found: Outlook, world: World) -> Plan:
        """Return the plan of a run as an outlook has it."""
        return planning.make_plan(
            resolved(found), found.ds_config, found.ds_name, self.model_facts, self.facts, world
        )


def price_of(run_dir: Path) -> float | None:
    """Return what a node of a run cost an hour when it was planned last: it goes on at that; None: nobody said."""
    cluster = (storage.read_json(run_dir / PLAN) or {}).get("cluster") or {}
    price = cluster.get("price_per_hour")
    return None if price is None else float(price) / int(cluster["num_nodes"])


def plan(asked: Asked, described: str | None, run_dir: Path) -> int:
    """Print plan and forecast, keep the forecast in the run directory; return the exit code.

    Args:
        asked: what was asked.
        described: the cluster in words; None: this machine.
        run_dir: of the run.

    Raises:
        ClusterError: the description cannot be read.
    """
    cluster = clusters.parse(described) if described else this_machine(asked.num_workers or 2)
    if asked.num_workers is not None:
        cluster = limited(cluster, asked.num_workers)
    cluster = clusters.priced(cluster, asked.price)
    found = _raised(outlook.look(*asked.arguments(cluster)))
    return told(asked, found, cluster.world, run_dir)


def told(asked: Asked, found: Outlook, world: World, run_dir: Path) -> int:
    """Print and keep an outlook; return the exit code: 2 if it does not fit."""
    stage = zero.zero_stage(found.ds_config)
    print("\n".join(report.plan_lines(asked.plan(found, world), asked.facts, stage, found.ds_name)))
    print("\n".join(found.lines()))
    storage.make_directory(run_dir)
    kept = run_dir / (ASKED if (run_dir / "recipe.yaml").exists() else PLAN)
    storage.write_json(kept, found.tree())
    print(f"kept in {kept}")
    return 0 if found.fits else 2


def look_on_cluster(asked: Asked, world: World) -> Callable[[], Outlook]:
    """Begin to forecast a run on the cluster that Ray is connected to, in a process of its own.

    Returns:
        What waits for the forecast, and raises LauncherError where the run cannot be planned.
    """
    # With the fewest workers it has to fit too.
    fewest = asked.num_workers or world.num_workers
    cluster = clusters.priced(limited(clusters.of_live(preflight.live()), fewest), asked.price)
    remote = ray.remote(num_cpus=1, runtime_env={"env_vars": environments.of_tasks()})(outlook.look)
    looking = remote.remote(*asked.arguments(cluster))
    return lambda: _raised(ray.get(looking))


def fly(asked: Asked, found: Outlook, world: World, run_dir: Path) -> list[str]:
    """Run the pre-flight; return what it found in words.

    Raises:
        ClusterError: a check failed.
    """
    made = asked.plan(found, world)
    worst = max(found.forecasts, key=lambda each: each.sent_bytes, default=None)
    wanted = preflight.Wanted(
        world=world,
        ds_config=made.stages[0].ds,
        run_root=run_dir.parent,
        model_path=asked.recipe.model.path,
        data_files=_data_files(asked.recipe),
        step_bytes=worst.sent_bytes if worst else None,
        compute_s=worst.work_s if worst else None,
        host_bytes=max((each.host_bytes for each in found.forecasts), default=None),
        disk_bytes=forecast.disk_bytes(found.forecasts, asked.recipe.checkpoint.keep),
    )
    results = preflight.check(wanted)
    storage.make_directory(run_dir)
    storage.write_json(run_dir / PREFLIGHT, {"findings": findings.as_json(results)})
    failed = [each for each in results if each.status == "failed"]
    lines = ["pre-flight:", *(f"  {line}" for line in findings.lines(results))]
    if failed:
        print("\n".join(lines))
        raise ClusterError(
            f"the pre-flight found {failed[0].name}: {failed[0].what} (--no-preflight skips it)"
        )
    return lines


def resolved(found: Outlook) -> Recipe:
    """Return the recipe with what `auto` chose."""
    return recipes.parse(found.recipe)


def is_long(found: Outlook) -> bool:
    """Return whether a run is expected to take long enough for a pre-flight to pay."""
    return forecast.total_s(found.forecasts) > LONG_S


def this_machine(num_workers: int) -> Cluster:
    """Describe this machine as a cluster of one node: its GPUs, or so many CPU workers."""
    machine = probes.machine(tempfile.gettempdir())
    gpus = machine["gpus"]
    facts = {
        "num_gpus": len(gpus),
        "gpu_name": gpus[0]["name"] if gpus else None,
        "gpu_bytes": min((gpu["bytes"] for gpu in gpus), default=None),
        "host_bytes": machine["host_bytes"],
        "num_cpus": max(num_workers, os.cpu_count() or 1),
        "disk_bytes": min(machine["disks"].values()),
    }
    return clusters.of_live([facts]) if gpus else limited(clusters.of_live([facts]), num_workers)


def limited(cluster: Cluster, num_workers: int) -> Cluster:
    """Return a cluster with so many workers: fewer nodes, or fewer workers of one node."""
    per_node, price = cluster.workers_per_node, cluster.price_per_hour
    if price is not None:
        needed = max(1, -(-num_workers // per_node))
        cluster = replace(cluster, price_per_hour=price / cluster.num_nodes * needed)
    if num_workers <= per_node:
        return replace(cluster, num_nodes=1, workers_per_node=num_workers)
    nodes = -(-num_workers // per_node)
    return replace(cluster, num_nodes=nodes, workers_per_node=-(-num_workers // nodes))


def _data_files(recipe: Recipe) -> tuple[str, ...]:
    from launcher import survey

    sets = [
        each for stage in recipe.stages for split in ("train", "eval") for each in stage.data.data_sets(split)
    ]  # type: ignore[arg-type]
    return tuple(dict.fromkeys(file for each in sets for file in survey.files_of(each)))


def _raised(found: Outlook | LauncherError) -> Outlook:
    if isinstance(found, LauncherError):
        raise found
    return found
