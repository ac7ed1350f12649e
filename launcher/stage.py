"""One stage on one rank: restore, train, evaluate, save, show examples, export."""

import os
import socket
import time
from typing import Any

import torch
import torch.distributed as dist

from launcher import bad_batches, examples, storage, telling
from launcher.assembly import Assembly, Context, assemble, write_export
from launcher.data import feed
from launcher.files import DONE
from launcher.judge import Verdict, judge
from launcher.part import in_lock_step
from launcher.plan.plan import StagePlan
from launcher.train.step import Wishes


class Leave(Exception):
    """The workers go because the driver wishes so; everything that they did is saved.

    Attributes:
        reason: of the wish, on rank 0.
        stage: in which they were.
        step: the last one that was made; 0 between stages.
    """

    def __init__(self, reason: str, stage: str, step: int) -> None:
        super().__init__(reason, stage, step)
        self.reason, self.stage, self.step = reason, stage, step


class StageRun:
    """One stage, or several that are trained jointly."""

    def __init__(self, context: Context, plan: StagePlan, watch: Any) -> None:
        """Build everything.

        Args:
            context: of this rank.
            plan: of the stage.
            watch: sees the memory of this process.
        """
        from launcher.train import checkpoint, writer

        self.context, self.plan, self.watch, self.pulse = context, plan, watch, context.pulse
        context.pulse.begin(plan.name)
        self.built: Assembly = assemble(context, plan)
        self.parts, self.engine = self.built.parts, self.built.engine
        self.main = self.parts[-1]
        keep, minutes = context.recipe.checkpoint.keep, context.plan.save_minutes
        folder = context.stage_dir(plan.name)
        saver = writer.Writer(self.engine.engine, in_background=not self.engine.is_offloaded)
        self.checkpoints = checkpoint.Checkpoints(
            folder / "checkpoints", saver, keep=keep, every_minutes=minutes, told=self.tell_checkpoint
        )
        self.best = checkpoint.Checkpoints(folder / "best", saver, keep=1, every_minutes=None)
        names = [part.name for part in self.parts]
        self.guard = bad_batches.guard(
            self.engine, context, stage=plan.name, parts=names, before_error=self.keep_before
        )
        self.metrics: dict[str, dict[str, float]] = {}
        self.tables: dict[str, dict[str, Any]] = {}
        self.verdict, self.num_seen, self.ended_at = Verdict(), 0, 0
        self.stepped_at_s = time.monotonic()
        self.used_at_s = self.stepped_at_s + telling.FIRST_AFTER_S - telling.EVERY_S
        self.begun: dict[str, Any] = {}
        self.data_s = 0.0
        self.totals = dict.fromkeys(("samples", "tokens", "slots", "data_s", "step_s", "stall_s"), 0.0)

    def run(self) -> None:
        """Restore, train, export, give the memory back."""
        from launcher.train import garbage, loop

        start = self.restore()
        self.tell_begin(start)
        num_steps = start if self.verdict.is_enough else self.plan.num_steps
        self.pulse.phase = "step"
        if self.plan.kind == "packed" and start < num_steps:
            self.engine.prove_packing(self.main.batches.step(start + 1).micro_batches[0])
        batches = feed.Steps(self.make, start + 1, num_steps)
        with garbage.held():
            loop.run(
                start=start if start < num_steps else self.plan.num_steps,
                schedule=self.plan.schedule,
                batch_of=lambda step: self.waited_for(batches, step),
                engine=self.guard,
                wishes=self.wishes,
                record=self.record,
                evaluate=self.evaluate,
                save=self.save,
                leave=self.leave,
                collect=garbage.after,
            )
        batches.close()
        self.finish()

    def wishes(self) -> Wishes:
        """Return what this rank wishes for after the next step."""
        return Wishes(save=self.checkpoints.clock_wants_save(), leave=bool(self.context.wish()))

    def restore(self) -> int:
        """Go on from the last checkpoint; return the steps done."""
        self.pulse.phase = "restore"
        start = self.checkpoints.restore(fingerprint=self.fingerprint, content=self.content)
        self.ended_at = start
        if start:
            self.take(self.checkpoints.latest().state)  # type: ignore[union-attr]
        return start

    def take(self, state: dict[str, Any]) -> None:
        """Take over what a checkpoint knows besides weights and position."""
        self.metrics, self.tables = dict(state.get("metrics", {})), dict(state.get("tables", {}))
        self.verdict = Verdict(**state.get("verdict", {}))
        self.num_seen = state.get("num_seen", 0)
        self.guard.rule.losses.extend(state.get("losses", []))

    def tell_begin(self, start: int) -> None:
        """Write the record of a stage's begin."""
        from launcher.train import peak, trainable

        total, trained = trainable.num_parameters(self.engine.parts)
        self.sizes = {"num_parameters": total, "num_trainable": trained}
        self.begun = {
            "start": start,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "num_workers": self.plan.num_workers,
            "num_nodes": telling.num_nodes(self.engine.device),
            "num_steps": self.plan.num_steps,
            "units_per_step": sum(part.plan.units_per_step for part in self.parts),
            "unit": self.plan.unit,
            "peak_flops": peak.flops(self.context.device, self.context.plan.dtype),
            **self._flops_per_token(),
            **self.sizes,
        }
        self.context.recorder.write("stage_begin", stage=self.plan.name, **self.begun)

    def _flops_per_token(self) -> dict[str, float]:
        """The model's floating-point operations for a token of average company: none where parts differ or nothing is known."""
        train, known = self.main.facts.train, self.context.token_flops.get(self.plan.name)
        if known is None or len(self.parts) > 1 or not train.num_samples:
            return {}
        # Attention's products were counted in samples as long as the longest.
        of_attention = train.num_tokens / train.num_samples / self.plan.max_length
        return {"flops_per_token": known[0] + min(1.0, of_attention) * known[1]}

    def make(self, step: int) -> tuple[feed.StepBatch, ...]:
        """Return the batches of a step, of every part."""
        return tuple(self.engine.pinned(batch) for batch in in_lock_step(self.parts, step))

    def waited_for(self, batches: Any, step: int) -> tuple[feed.StepBatch, ...]:
        """Return a step's batches, and note how long they took to come."""
        self.pulse.step, self.pulse.phase = step, "data"
        asked_s = time.monotonic()
        made: tuple[feed.StepBatch, ...] = batches(step)
        self.data_s, self.pulse.phase = time.monotonic() - asked_s, "step"
        return made

    def record(self, batches: tuple[feed.StepBatch, ...], result: Any) -> None:
        """Write the record of one step."""
        self.checkpoints.check()
        now_s = time.monotonic()
        if result.fault:
            self.ended_at, self.stepped_at_s = batches[-1].step, now_s
            self.context.recorder.write(
                "skipped", stage=self.plan.name, step=self.ended_at, fault=result.fault
            )
            return
        spent: dict[str, float] = {
            "samples": sum(batch.num_samples for batch in batches),
            "tokens": sum(batch.num_tokens for batch in batches),
            "slots": sum(batch.num_slots for batch in batches),
            "data_s": round(self.data_s, 5),
            "step_s": round(now_s - self.stepped_at_s, 4),
        }
        for name, value in spent.items():
            self.totals[name] += value
        self.num_seen += int(spent["samples"])
        step = self.ended_at = batches[-1].step
        by_part = {part.name: loss for part, loss in zip(self.parts, result.losses, strict=True)}
        self.context.recorder.write(
            "step",
            stage=self.plan.name,
            step=step,
            loss=result.loss,
            gradient_norm=result.gradient_norm,
            lr=result.learning_rate,
            epoch=batches[-1].epoch,
            targets=sum(batch.num_targets for batch in batches),
            **spent,
            **({"losses": by_part} if len(by_part) > 1 else {}),
        )
        self.stepped_at_s = now_s
        if self.context.rank == 0 and now_s - self.used_at_s >= telling.EVERY_S:
            self.used_at_s, told = now_s, {"spent": self.totals, "metrics": self.metrics}
            used = self.watch.usage()
            telling.usage(
                self.context.recorder, used, stage=self.plan.name, step=step, begun=self.begun, **told
            )
        if self.context.samples is not None and self.context.rank % self.plan.team == 0:
            for part, batch in zip(self.parts, batches, strict=True):
                ids = [int(i) for micro_batch in batch.micro_batches for i in micro_batch.samples]
                self.context.samples.write("samples", stage=part.name, step=step, ids=ids)

    def evaluate(self, step: int) -> bool:
        """Evaluate every part that has an eval split; return whether training has gone on long enough."""
        self.pulse.phase = "evaluate"
        for i, part in enumerate(self.parts):
            if part.facts.eval is not None:
                batches = self.pulse.counted(part.eval_batches())
                sums = self.engine.sums(i, batches)
                self.metrics[part.name], self.tables[part.name] = (
                    part.task.metrics(sums),
                    part.task.tables(sums),
                )
                self.context.recorder.write(
                    "eval", stage=part.name, step=step, metrics=self.metrics[part.name]
                )
        if self.main.asked.select is not None:
            self.verdict = judge(
                self.main.asked, self.verdict, self.metrics[self.main.name], task=self.main.task
            )
            if self.verdict.is_best:
                self.best.save(step, self.state(step))
        self._stood_still()
        return self.verdict.is_enough

    def state(self, step: int) -> dict[str, Any]:
        """Return what a checkpoint keeps besides weights and optimizer."""
        return {
            "position": step,
            "fingerprint": self.fingerprint,
            "content": self.content,
            "metrics": self.metrics,
            "tables": self.tables,
            "verdict": self.verdict.state(),
            "num_seen": self.num_seen,
            # Only where they are judged by: a restart has to judge alike.
            **({"losses": list(self.guard.rule.losses)} if self.guard.rule.spike is not None else {}),
        }

    def save(self, step: int) -> None:
        """Save what continues the run after `step`."""
        self.pulse.phase = "save"
        self.totals["stall_s"] += self.checkpoints.save(step, self.state(step))
        self._stood_still()

    def _stood_still(self) -> None:
        """Use a stop that all ranks make; the next step's time begins."""
        from launcher.train import garbage

        garbage.everything()
        self.stepped_at_s = time.monotonic()

    def tell_checkpoint(self, saved: dict[str, Any]) -> None:
        """Write the record of a checkpoint that is committed: its step, bytes, and how long training stood still."""
        self.context.recorder.write("checkpoint", stage=self.plan.name, **saved)

    def keep_before(self, step: int) -> None:
        """Save what was trained before a step that ends the run, unless the run is to go back."""
        self.checkpoints.wait()
        latest = self.checkpoints.latest()
        if self.context.recipe.on_nan != "rollback" and step > 1 + (latest.step if latest else 0):
            self.save(step - 1)
            self.checkpoints.wait()

    def leave(self, step: int) -> None:
        """Go, now that all of it is saved.

        Raises:
            Leave: always.
        """
        self.pulse.phase = "save"
        self.checkpoints.wait()
        raise Leave(self.context.wish(), self.plan.name, step)

    def finish(self) -> None:
        """Export what was trained, or the best of it, then mark the stage as done."""
        self.pulse.phase = "save"
        facts = {"steps": self.ended_at, "samples": self.num_seen, **self.sizes, **self._shares()}
        facts["memory"] = self.most_memory()
        self.checkpoints.wait()
        if (best := self.best.latest()) is not None:
            self.pulse.phase = "restore"
            self.best.restore(fingerprint=self.fingerprint, content=self.content)
            self.metrics, facts["best_step"] = dict(best.state["metrics"]), best.step
            self.tables = dict(best.state.get("tables", {}))
        for i, part in enumerate(self.parts):
            if not self.plan.is_baseline:
                examples.write(self.context, self.engine, i, part, self.tables.get(part.name, {}))
                write_export(self.context, part, i, self.built)
            if self.context.rank == 0:
                done = {"metrics": self.metrics.get(part.name, {}), **facts}
                storage.write_json(self.context.stage_dir(part.name) / DONE, done)
        self.engine.close()

    def most_memory(self) -> dict[str, int | None]:
        """Return the bytes at the peak of the worker that used most, on its `device` and in its `host`'s memory."""
        mine = self.watch.usage()
        most = torch.tensor([mine.device or 0, mine.host], dtype=torch.int64, device=self.engine.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        device, host = most.tolist()
        return {"device": device if mine.device is not None else None, "host": host}

    @property
    def fingerprint(self) -> str:
        """Of all parts' data and of how it is batched: what a position means."""
        return "+".join(part.fingerprint for part in self.parts)

    @property
    def content(self) -> str:
        """A hash of all tokens to train on; empty while some are still being made."""
        contents = [part.content for part in self.parts]
        return "+".join(contents) if all(contents) else ""

    def _shares(self) -> dict[str, float]:
        """What of this process's steps went into padding, and into waiting for data."""
        of = self.totals
        if not of["slots"]:
            return {}  # A process that came after the last step.
        return {
            "padding": round(1 - of["tokens"] / of["slots"], 4),
            "data_wait": round(of["data_s"] / of["step_s"], 5),
            "checkpoint_stall_s": round(of["stall_s"], 3),
        }


def leave_if_asked(context: Context) -> None:
    """Go between two stages, where rank 0 knows of a wish; every rank must call it.

    Raises:
        Leave: there is one.
    """
    asked = torch.tensor([int(bool(context.wish()))], device=context.device)
    dist.broadcast(asked, 0)
    if asked.item():
        raise Leave(context.wish(), "", 0)
