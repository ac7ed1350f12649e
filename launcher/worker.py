"""One rank's life: the one place where data, tasks and training meet. Begins anew after every failure."""

import logging
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist

from launcher import recipe as recipes
from launcher import storage, tasks
from launcher.data import feed
from launcher.data.split import Split
from launcher.data.store import Store
from launcher.errors import LauncherError
from launcher.plan.plan import Plan, StagePlan, World, make_plan
from launcher.recipe import Recipe
from launcher.report.record import Event, Recorder

DONE = "done.json"
PROBE_SAMPLES = 4
POST_EVERY_S = 0.1


def train(job: dict[str, Any]) -> None:
    """Run all stages that are not done yet; what Ray Train calls on every rank.

    Args:
        job: recipe (a tree), ds_config, ds_name, model_facts, prepared, run_dir, device, bulletin (an
            actor's name): plain data, nothing computed from the number of workers.
    """
    rank = ray.train.get_context().get_world_rank()
    _send_chatter_to(Path(job["run_dir"]) / "logs" / f"rank-{rank}.log")
    try:
        Rank(job, rank).run()
    except LauncherError as error:
        event = {"kind": "error", "type": type(error).__name__, "message": str(error)}
        ray.get(ray.get_actor(job["bulletin"]).post.remote(event))
        raise


class Rank:
    """What one rank holds between stages."""

    def __init__(self, job: dict[str, Any], rank: int) -> None:
        self.job, self.rank = job, rank
        if job["device"] == "cpu":
            # More threads than cores make ranks wait for each other's.
            ranks_here = ray.train.get_context().get_local_world_size()
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks_here))
        self.run_dir = Path(job["run_dir"])
        self.recipe: Recipe = recipes.parse(job["recipe"])
        self.prepared = job["prepared"]
        world = World(num_workers=dist.get_world_size(), device=job["device"])
        self.plan: Plan = make_plan(
            self.recipe, job["ds_config"], job["ds_name"], job["model_facts"], self.prepared.facts, world
        )
        listener = _listener(job["bulletin"]) if rank == 0 else None
        self.recorder = Recorder(self.run_dir / "metrics.jsonl" if rank == 0 else None, listener)
        self.samples = None
        if self.recipe.log_samples:
            self.samples = Recorder(self.run_dir / "logs" / f"samples-rank-{rank}.jsonl")

    def run(self) -> None:
        """Do the stages in order."""
        for stage in self.plan.stages:
            if storage.read_json(self.stage_dir(stage) / DONE) is None:
                StageRun(self, stage).run()
                dist.barrier()

    def stage_dir(self, stage: StagePlan) -> Path:
        """Where a stage keeps its checkpoints and its export."""
        return self.run_dir / "stages" / stage.name

    def start_directory(self, stage: StagePlan) -> str:
        """The model that a stage starts with."""
        if stage.starts_from is None:
            return str(self.prepared.model_directory)
        return str(self.run_dir / "stages" / stage.starts_from / "export")


class StageRun:
    """One stage on one rank."""

    def __init__(self, rank: Rank, plan: StagePlan) -> None:
        from launcher.train import checkpoint, engine, model

        self.rank, self.plan = rank, plan
        self.asked = rank.recipe.stages[plan.index]
        self.facts = rank.prepared.facts[plan.index]
        self.directory = rank.stage_dir(plan)
        self.device = ray.train.torch.get_device()
        self.tokenizer = model.load_tokenizer(rank.recipe.model)
        self.task = tasks.create(self.asked)
        self.stores = [Store(Path(path)) for path in self.facts.train.stores]
        self.task.columns(self.stores[0].manifest.columns)
        self.task.set_tokenizer(self.tokenizer, plan.max_length)
        self.pad = model.pad_token_id(self.tokenizer)
        options = self.task.model_options(self.facts.train.labels)
        loaded = model.load(
            rank.recipe.model,
            rank.start_directory(plan),
            self.task.auto_model,
            options=options | {"pad_token_id": self.pad},
            new_head=bool(options) and self.asked.head == "new",
            dtype=rank.plan.dtype,
            ds=plan.ds,
            seed=self.asked.seed,
        )
        self.engine = engine.Engine(loaded, self.task, plan, seed=self.asked.seed, device=self.device)
        self.checkpoints = checkpoint.Checkpoints(
            self.directory / "checkpoints",
            keep=rank.recipe.checkpoint.keep,
            every_minutes=rank.plan.save_minutes,
        )
        self.last_metrics: dict[str, float] = {}
        self.stepped_at_s, self.data_s = time.monotonic(), 0.0
        self.totals = dict.fromkeys(("samples", "tokens", "slots", "data_s", "step_s"), 0.0)

    def run(self) -> None:
        """Restore, train, export, give the memory back."""
        from launcher.train import loop

        start = self.checkpoints.restore(
            self.engine.engine, fingerprint=self.fingerprint, content=self.content
        )
        self.last_metrics = self._metrics_of_checkpoint() if start else {}
        self.rank.recorder.write(
            "stage_begin",
            stage=self.plan.name,
            start=start,
            pid=os.getpid(),
            host=socket.gethostname(),
            num_workers=self.plan.num_workers,
            num_steps=self.plan.num_steps,
            units_per_step=self.plan.units_per_step,
            unit=self.plan.unit,
        )
        own = self._feed()
        if self.plan.kind == "packed" and start < self.plan.num_steps:
            self.engine.prove_packing(own.step(start + 1).micro_batches[0])
        batches = feed.Steps(lambda step: self.engine.pinned(own.step(step)), start + 1, self.plan.num_steps)
        loop.run(
            start=start,
            schedule=self.plan.schedule,
            batch_of=lambda step: self.waited_for(batches, step),
            engine=self.engine,
            clock_wants_save=self.checkpoints.clock_wants_save,
            record=self.record,
            evaluate=self.evaluate,
            save=self.save,
        )
        batches.close()
        self.finish()

    def waited_for(self, batches: feed.Steps, step: int) -> feed.StepBatch:
        """Return a step's batch, and note how long it took to come."""
        asked_s = time.monotonic()
        batch = batches(step)
        self.data_s = time.monotonic() - asked_s
        return batch

    def record(self, batch: feed.StepBatch, result: Any) -> None:
        """Write the record of one step."""
        now_s = time.monotonic()
        spent: dict[str, float] = {
            "samples": batch.num_samples,
            "tokens": batch.num_tokens,
            "slots": batch.num_slots,
            "data_s": round(self.data_s, 5),
            "step_s": round(now_s - self.stepped_at_s, 4),
        }
        for name, value in spent.items():
            self.totals[name] += value
        self.rank.recorder.write(
            "step",
            stage=self.plan.name,
            step=batch.step,
            loss=result.loss,
            gradient_norm=result.gradient_norm,
            lr=result.learning_rate,
            epoch=batch.epoch,
            targets=batch.num_targets,
            **spent,
        )
        self.stepped_at_s = now_s
        if self.rank.samples is not None:
            ids = [int(i) for micro_batch in batch.micro_batches for i in micro_batch.samples]
            self.rank.samples.write("samples", stage=self.plan.name, step=batch.step, ids=ids)

    def evaluate(self, step: int) -> None:
        """Evaluate on the whole eval split, if there is one."""
        if self.facts.eval is None:
            return
        self.last_metrics = self.engine.evaluate(self._eval_batches())
        self.rank.recorder.write("eval", stage=self.plan.name, step=step, metrics=self.last_metrics)
        self.stepped_at_s = time.monotonic()

    def save(self, step: int) -> None:
        """Save what continues the run after `step`."""
        state = {
            "position": step,
            "fingerprint": self.fingerprint,
            "content": self.content,
            "metrics": self.last_metrics,
        }
        self.checkpoints.save(self.engine.engine, step, state)
        self.rank.recorder.write("checkpoint", stage=self.plan.name, step=step)
        self.stepped_at_s = time.monotonic()

    def finish(self) -> None:
        """Export the stage's model with a probe to verify it by, then mark the stage as done."""
        from launcher.train import export
        from launcher.train.model import DTYPES

        if not self.plan.is_baseline:
            probe = self._probe_batch()
            logits = self.engine.logits(probe)
            target = self.directory / "export"
            export.write(self.engine.module, self.tokenizer, target, DTYPES[self.rank.plan.dtype])
            if self.rank.rank == 0:
                export.write_probe(self.directory / export.PROBE, probe.features, logits)
            self.rank.recorder.write("export", stage=self.plan.name, path=str(target))
        if self.rank.rank == 0:
            done = {"metrics": self.last_metrics, "steps": self.plan.num_steps, **self._shares()}
            storage.write_json(self.directory / DONE, done)
        self.engine.close()

    @property
    def fingerprint(self) -> str:
        """Of the data and of how it is batched: what a position means."""
        return f"{self.facts.train.fingerprint}/{self.plan.kind}/{self.plan.units_per_step}"

    @property
    def content(self) -> str:
        """A hash of all tokens to train on; empty while some are still being made."""
        metas = [store.meta for store in self.stores]
        return "" if None in metas else "/".join(meta["content"] for meta in metas if meta)

    def _feed(self) -> feed.Feed:
        batching = feed.Batching(
            kind=self.plan.kind,
            by_tokens=self.task.loss_unit == "token",
            units_per_step=self.plan.units_per_step,
            micro_batch=self.plan.micro_batch,
            budget_tokens=self.plan.budget_tokens,
        )
        return feed.Feed(
            self.stores,
            list(self.facts.train.weights),
            batching,
            fingerprint=self.facts.train.fingerprint,
            seed=self.asked.seed,
            num_workers=self.plan.num_workers,
            rank=self.rank.rank,
            pad_token_id=self.pad,
        )

    def _shares(self) -> dict[str, float]:
        """What of this process's steps went into padding, and into waiting for data."""
        of = self.totals
        if not of["slots"]:
            return {}  # A process that came after the last step.
        return {
            "padding": round(1 - of["tokens"] / of["slots"], 4),
            "data_wait": round(of["data_s"] / of["step_s"], 5),
        }

    def _eval_batches(self) -> Any:
        assert self.facts.eval is not None
        return feed.eval_batches(
            [Store(Path(path)) for path in self.facts.eval.stores],
            micro_batch=self.plan.micro_batch,
            budget_tokens=self.plan.budget_tokens,
            num_workers=self.plan.num_workers,
            rank=self.rank.rank,
            pad_token_id=self.pad,
        )

    def _probe_batch(self) -> feed.MicroBatch:
        """The first few samples, the same on every rank."""
        split = Split([Store(Path(path)) for path in (self.facts.eval or self.facts.train).stores])
        return feed.collate(split, split.first_samples(PROBE_SAMPLES), pad_token_id=self.pad)

    def _metrics_of_checkpoint(self) -> dict[str, float]:
        found = self.checkpoints.latest()
        return dict(found.state.get("metrics", {})) if found else {}


def _send_chatter_to(path: Path) -> None:
    """Keep what libraries print, also from C++, in the run directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    logging.basicConfig(stream=os.fdopen(os.dup(log), "a", buffering=1), level=logging.INFO, force=True)


def _listener(bulletin: str) -> Callable[[Event], None]:
    """Post events to the driver without waiting; of steps only what a person can follow."""
    actor = ray.get_actor(bulletin)
    posted_at_s = [0.0]

    def listen(event: Event) -> None:
        now_s = time.monotonic()
        if event["kind"] == "step" and now_s - posted_at_s[0] < POST_EVERY_S and event["step"] % 10:
            return
        posted_at_s[0] = now_s
        actor.post.remote(event)

    return listen
