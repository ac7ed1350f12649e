"""The token stores of a run, made on the cluster before the training and beside it."""

import itertools
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from launcher import environments, storage
from launcher import recipe as recipes
from launcher.describe import Described, describe
from launcher.errors import ClusterError, LauncherError, RunExists
from launcher.facts import Prepared, facts, needed_first
from launcher.plan import plan as planning
from launcher.plan import zero
from launcher.plan.plan import ModelFacts, World
from launcher.preparation import Preparation
from launcher.prepare import manifest_of
from launcher.recipe import Recipe
from launcher.report.view import View

DATA, STORES = "data.json", "stores.json"


@contextmanager
def prepared(
    recipe: Recipe,
    ds_config: dict[str, Any],
    model_facts: ModelFacts,
    folder: Path,
    world: World,
    view: View,
    chunk_bytes: int | None = None,
) -> Iterator[Prepared]:
    """Make token stores and first weights in Ray tasks, before the run directory exists.

    Yields when training can begin; what training does not need yet is made beside it.

    Args:
        recipe: what was asked.
        ds_config: the ds config, for what it fixes.
        model_facts: of the first model.
        folder: where the stores are kept; seen by all nodes.
        world: the workers that will train.
        view: is shown how far it is.
        chunk_bytes: input of one task, about. Default: by the size of the data.

    Raises:
        BadInput: the data, the tokenizer or the config cannot be used.
        StorageError: the stores cannot be written.
        ClusterError: some node does not see `folder`.
    """
    _check_shared(folder)
    # The process that does this goes on to make chunks: what it has imported is not imported again.
    remote = ray.remote(num_cpus=1, runtime_env={"env_vars": environments.of_tasks()})(describe)
    described = ray.get(remote.remote(recipes.dump(recipe), model_facts, str(folder), chunk_bytes))
    if isinstance(described, LauncherError):
        raise described
    executor = OnRay()
    preparation = Preparation(described.jobs, executor, view.show)
    preparation.start()
    try:
        given = zero.given(ds_config)
        known = [each.train for each in facts(recipe, described)]
        is_packed = [
            planning.batching(stage, train, given, world) == "packed"
            for stage, train in zip(recipe.stages, known, strict=True)
        ]
        preparation.wait_for(*needed_first(recipe, described, is_packed))
        executor.yield_to(world.num_workers)
        view.end_line()
        names = _names(described, folder)
        yield Prepared(facts(recipe, described), described.model_directory, _data_files(described), names)
    finally:
        preparation.close()


def check_data(run_dir: Path, now: dict[str, list[tuple[str, int]]]) -> None:
    """Refuse to continue a run on other files than it began with.

    Args:
        run_dir: of the run.
        now: `Prepared.data_files`.

    Raises:
        RunExists: names the first file that differs.
    """
    before = storage.read_json(run_dir / DATA) or {}
    for name, files in before.items():
        for old, new in itertools.zip_longest(files, now.get(name, [])):
            if tuple(old or ()) != tuple(new or ()):
                then, here = (f"{x[0]} with {x[1]:,} bytes" if x else "no such file" for x in (old, new))
                raise RunExists(
                    f"{run_dir}: the data of {name} has changed since this run began: {then} then, {here}"
                    " now: restore it, or begin anew with --fresh"
                )


def _data_files(described: Described) -> dict[str, list[tuple[str, int]]]:
    return {
        f"{job.name} [{job.number}]": [(file, size) for file, size, _ in manifest_of(job.directory).files]
        for job in described.jobs
    }


def _names(described: Described, folder: Path) -> tuple[str, ...]:
    """What a run trains from, of what is in the folder of stores."""
    places = [Path(job.directory) for job in described.jobs] + [Path(described.model_directory)]
    return tuple(dict.fromkeys(place.name for place in places if place.parent == folder))


class OnRay:
    """Runs the tasks of the preparation on the cluster's CPUs."""

    def __init__(self) -> None:
        self._most = max(1, int(ray.cluster_resources().get("CPU", 1)))
        self._num_cpus: float = 1
        self._refs: list[Any] = []
        self._remote: dict[Callable[..., Any], Any] = {}

    def yield_to(self, num_workers: int) -> None:
        """Leave the workers their CPUs: they could not be placed otherwise."""
        spare = int(ray.cluster_resources().get("CPU", 1)) - num_workers
        # Without a spare one, one task at a time shares the workers' CPUs.
        self._most, self._num_cpus = max(1, spare), 1 if spare > 0 else 0
        self._remote.clear()

    def room(self) -> bool:
        """See `preparation.Executor`."""
        return len(self._refs) < self._most

    def submit(self, function: Callable[..., Any], *args: Any) -> Any:
        """See `preparation.Executor`."""
        if function not in self._remote:
            options: dict[str, Any] = {"num_cpus": self._num_cpus, "scheduling_strategy": "SPREAD"}
            options["runtime_env"] = {"env_vars": environments.of_tasks()}
            self._remote[function] = ray.remote(**options)(function)
        self._refs.append(self._remote[function].remote(*args))
        return self._refs[-1]

    def cancel(self) -> None:
        """See `preparation.Executor`."""
        for ref in self._refs:
            ray.cancel(ref, force=True)

    def done(self, timeout_s: float) -> list[tuple[Any, Any]]:
        """See `preparation.Executor`."""
        if not self._refs:
            time.sleep(timeout_s)
            return []
        ended, self._refs = ray.wait(self._refs, num_returns=1, timeout=timeout_s)
        return [(ref, _result(ref)) for ref in ended]


def _result(ref: Any) -> Any:
    try:
        return ray.get(ref)
    except ray.exceptions.RayError as error:
        last_line = str(error).strip().splitlines()[-1]
        return ClusterError(
            f"a task of the preparation failed: {last_line}: what was prepared so far is kept, the same"
            " command goes on from there"
        )


def _check_shared(folder: Path) -> None:
    """Refuse a run root that some node does not see: its workers could not read or save anything."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return
    probe = folder / f".probe-{uuid.uuid4().hex[:8]}"
    probe.touch()
    try:
        look = ray.remote(num_cpus=0)(os.path.exists)
        for node in nodes:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            if not ray.get(look.options(scheduling_strategy=there).remote(str(probe))):
                raise ClusterError(
                    f"the run root {folder.parent} is not seen by node {node['NodeManagerAddress']}: with"
                    " several nodes, give --run-root a directory on storage that all of them share"
                )
    finally:
        probe.unlink(missing_ok=True)
