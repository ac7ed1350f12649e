"""The job seen from outside: the cluster, the preparation, Ray Train with its policies, how it ended."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from launcher import autoscaler, capacity, environments, failures, probes, spare, storage
from launcher import recipe as recipes
from launcher.capacity import Workers
from launcher.errors import ExportFailed
from launcher.facts import Prepared
from launcher.files import AFTER, DONE, HALVINGS
from launcher.generation import Generation, Reason
from launcher.group import Group
from launcher.outlook import Outlook
from launcher.plan.plan import ModelFacts, World
from launcher.recipe import Recipe
from launcher.report import memory
from launcher.report import summary as report
from launcher.report.history import WHY, Life
from launcher.report.view import View
from launcher.verify import Verified, verify_stage

Meddle = Callable[[Generation], None]
WAIT_S = 1800.0
"""How long to wait for nodes that are to take the place of lost ones."""
GROW_AFTER_S = 10.0
"""How long to wait for more new nodes before the run grows onto those that have come: they seldom come alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run as the command line resolved it.

    Attributes:
        workers: the fewest and the most; None: as many as there are when it begins.
    """

    recipe: Recipe
    ds_config: dict[str, Any]
    ds_name: str
    model_facts: ModelFacts
    run_dir: Path
    outlook: Outlook
    workers: Workers | None = None
    wait_s: float = WAIT_S


def run(
    job: Job,
    world: World,
    view: View,
    prepared: Prepared,
    lives: list[Life],
    meddle: Meddle | None = None,
) -> dict[str, Any]:
    """Train by one generation of workers after another, verify and sum up.

    Args:
        job: what to run.
        world: the workers to begin with.
        view: shows events.
        prepared: the data.
        lives: is given each generation as it begins.
        meddle: is called while a generation trains; for trials.

    Returns:
        The summary that is also written to summary.json.

    Raises:
        LauncherError: whatever a worker met first.
        KeyboardInterrupt: the user has stopped the run; what was trained is saved.
    """
    asked, logs = job.recipe, str(job.run_dir / "logs")
    policy = failures.Policy(asked.max_failures, asked.on_oom, logs, asked.on_nan)
    kind = world.kind
    fewest, most = job.workers or (world.num_workers, world.num_workers)
    while True:
        group = Group(
            job=_for_workers(job, world, prepared),
            num_workers=world.num_workers,
            on_gpu=world.device == "cuda",
            run_dir=job.run_dir,
            policy=policy,
            is_elastic=fewest < most,
            hang_minutes=None if job.recipe.hang_minutes == "auto" else job.recipe.hang_minutes,
        )
        generation = Generation(group, view)
        with _lived(lives, generation) as life:
            watch = _Watch(world.num_workers, most, kind, view, meddle, job.recipe.spares)
            missing = most - world.num_workers
            if missing and not autoscaler.state().is_there:
                missing = 0
            with autoscaler.demand(kind, missing, is_gang=False):
                reason = life.reason = generation.run(watch)
        if reason == "done":
            return _finish(job, world, prepared, view)
        if reason == "stop":
            raise KeyboardInterrupt
        there = capacity.wait_for(fewest, most, kind, job.wait_s, view.say)
        if there != world.num_workers or reason != "lost":
            view.say(f"going on with {there} workers: {WHY[reason]}")
        world = replace(world, num_workers=there)


@contextmanager
def _lived(lives: list[Life], generation: Generation) -> Iterator[Life]:
    """Keep what becomes of a generation, however it ends."""
    lives.append(life := Life(generation.group.num_workers, time.time(), generation.events))
    try:
        yield life
    finally:
        life.ended_s, life.nodes_gone = time.time(), capacity.num_gone(generation.nodes)


class _Watch:
    """Looks at the cluster, and at the user's signals, while a generation trains."""

    def __init__(
        self,
        num_workers: int,
        most: int,
        kind: str,
        view: View,
        meddle: Meddle | None,
        has_spares: bool,
    ) -> None:
        self.num_workers, self.most, self.kind, self.view = num_workers, most, kind, view
        self.meddle, self.has_spares = meddle, has_spares
        self.welcomed: set[str] = set()
        self.asked: Reason | None = None
        self.looked_s = self.grown_s = time.monotonic()

    def look(self, generation: Generation) -> None:
        """Ask the workers to leave where the cluster gives a reason."""
        if self.meddle is not None:
            self.meddle(generation)
        now_s = time.monotonic()
        if now_s - self.looked_s < 1 or self.asked:
            return
        self.looked_s, nodes = now_s, capacity.look(self.kind)
        self._welcome(generation, nodes)
        if going := generation.nodes & nodes.draining:
            self.view.say(f"{len(going)} of the nodes will soon go: saving, then going on without")
            self._ask(generation, "preempted")
        elif min(nodes.num_workers, self.most) <= self.num_workers:
            self.grown_s = now_s
        elif generation.has_begun and (nodes.num_workers >= self.most or now_s - self.grown_s > GROW_AFTER_S):
            self._ask(generation, "grow")

    def interrupt(self, generation: Generation) -> None:
        """Let the workers save and leave; the second time, or where there is nothing to save, end at once.

        Raises:
            KeyboardInterrupt: to end at once.
        """
        if self.asked == "stop" or not generation.has_begun:
            raise KeyboardInterrupt
        self.view.say("stopping after a checkpoint at the end of this step; once more stops at once")
        self._ask(generation, "stop")

    def _welcome(self, generation: Generation, nodes: capacity.Nodes) -> None:
        """Let processes start on nodes that have just come, while the workers still train and save."""
        if not self.has_spares or not generation.has_begun or nodes.num_workers <= self.num_workers:
            return
        room = self.most - self.num_workers
        for node, num_workers in nodes.workers.items():
            if node not in generation.nodes | self.welcomed and (num_starting := min(num_workers, room)) > 0:
                self.welcomed.add(node)
                room -= num_starting
                env_vars = environments.of_workers(on_gpu=generation.group.on_gpu)
                spare.order(spare.Order(node, num_starting, env_vars))

    def _ask(self, generation: Generation, wish: Reason) -> None:
        self.asked = wish
        generation.ask(wish)


def _for_workers(job: Job, world: World, prepared: Prepared) -> dict[str, Any]:
    return {
        "recipe": recipes.dump(job.recipe),
        "ds_config": job.ds_config,
        "ds_name": job.ds_name,
        "model_facts": job.model_facts,
        "prepared": prepared,
        "run_dir": str(job.run_dir),
        "device": world.device,
        "half": world.half,
        "predicted": job.outlook.predicted(),
        "token_flops": job.outlook.token_flops(),
        "versions": probes.versions(),
    }


def _finish(job: Job, world: World, prepared: Prepared, view: View) -> dict[str, Any]:
    """Verify every export in a fresh process, and write the summary."""
    verified = _verified(job)
    stages: dict[str, Any] = {}
    for name in [stage.name for stage in job.recipe.stages] + (["baseline"] if job.recipe.baseline else []):
        folder = job.run_dir / "stages" / name
        stages[name] = storage.read_json(folder / DONE) or {}
        if (after := storage.read_json(folder / AFTER)) is not None:
            stages[name]["after"] = after["metrics"]
        predicted, used = job.outlook.predicted().get(name, {}), stages[name].get("memory", {})
        stages[name]["memory"] = memory.comparison(predicted, used)
        if name in verified:
            stages[name] |= {"export": str(folder / "export"), "verified": verified[name].difference}
            stages[name] |= {"notes": notes} if (notes := verified[name].notes) else {}
    view.say("exports verified: read back in a fresh process, the same logits as trained")
    summary: dict[str, Any] = {"stages": stages, "num_workers": world.num_workers, "device": world.device}
    if halvings := storage.read_json(job.run_dir / HALVINGS):
        summary["halvings"] = halvings
    is_joint, last = job.recipe.transfer == "joint", job.recipe.stages[-1].name
    if transfer := report.transfer(stages, verified[last].metric, is_joint=is_joint):
        summary["transfer"] = transfer
    storage.write_json(job.run_dir / "summary.json", summary)
    return summary


def _verified(job: Job) -> dict[str, Verified]:
    """Return what was found of each stage's export."""
    # One process for each export.
    how = {"max_calls": 1, "runtime_env": {"env_vars": environments.of_verification()}}
    task = ray.remote(num_cpus=1, **how)(verify_stage)
    pending = {
        stage.name: task.remote(recipes.dump_stage(stage), str(job.run_dir / "stages" / stage.name))
        for stage in job.recipe.stages
    }
    results = dict(zip(pending, ray.get(list(pending.values())), strict=True))
    for result in results.values():
        if isinstance(result, ExportFailed):
            raise result
    return results
