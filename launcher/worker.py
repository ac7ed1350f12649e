"""One rank's life, as Ray Train calls it. Begins anew after every failure."""

import logging
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from launcher import heart, oom_kills, probes, spare, storage
from launcher import recipe as recipes
from launcher.assembly import Context
from launcher.errors import LauncherError, OutOfMemory
from launcher.files import DONE, HALVINGS
from launcher.forgetting import measure_again
from launcher.plan import offload
from launcher.plan.plan import StagePlan, World, make_plan
from launcher.pulse import Pulse
from launcher.report import memory as report
from launcher.report.record import Event, Recorder
from launcher.stage import Leave, StageRun, leave_if_asked

POST_EVERY_S, LOOK_EVERY_S = 0.1, 0.3


def train(job: dict[str, Any]) -> None:
    """Run all stages that are not done yet; what Ray Train calls on every rank.

    Args:
        job: recipe (a tree), ds_config, ds_name, model_facts, prepared, run_dir, device, bulletin (an
            actor's name), predicted (bytes by stage), token_flops (as of `Outlook`), versions (the driver's): plain
            data, nothing computed from the number of workers.
    """
    rank = ray.train.get_context().get_world_rank()
    place = {"node": ray.get_runtime_context().get_node_id(), "host": socket.gethostname()}
    _tell(job, kind="worker", rank=rank, pid=os.getpid(), oom_kills=oom_kills.count(), **place)
    _send_chatter_to(Path(job["run_dir"]) / "logs" / f"rank-{rank}.log")
    try:
        probes.check_versions(job["versions"], place["host"])
        with heart.beating(job["bulletin"], rank, Path(job["run_dir"])) as pulse, _spare(job):
            _run(job, rank, pulse)
    except Leave as leave:
        if rank == 0:
            _tell(job, kind="left", reason=leave.reason, stage=leave.stage, step=leave.step)
    except LauncherError as error:
        _tell(job, kind="error", type=type(error).__name__, message=str(error))
        raise
    except Exception:
        logging.getLogger(__name__).exception("rank %s ends", rank)
        raise


def _run(job: dict[str, Any], rank: int, pulse: Pulse) -> None:
    """Do the stages in order; then look at what was forgotten."""
    offload.check_disks(job["ds_config"], job["ds_name"])
    from launcher.train import peak

    context = _context(job, rank, pulse)
    peak.flops(context.device, context.plan.dtype)  # Known from now on; while the device's memory is free.
    for plan in context.plan.stages:
        if storage.read_json(context.stage_dir(plan.name) / DONE) is None:
            _stage(context, plan, job["predicted"].get(plan.name, {}))
            pulse.phase = "wait"
            leave_if_asked(context)
    *earlier, last = [plan for plan in context.plan.stages if not plan.is_baseline]
    for plan in earlier:
        measure_again(context, plan, last)
        pulse.phase = "wait"
        dist.barrier()


def _stage(context: Context, plan: StagePlan, predicted: dict[str, int | None]) -> None:
    """Run a stage, and watch its memory."""
    from launcher.train import usage

    watch = usage.Watch(context.device)
    try:
        StageRun(context, plan, watch).run()
    except (RuntimeError, MemoryError) as error:
        if not usage.is_out_of_memory(error):
            raise
        message = report.out_of_memory(
            plan, predicted, watch.usage(), watch.room(), rank=context.rank, host=socket.gethostname()
        )
        raise OutOfMemory(message, plan.name, plan.can_halve) from error


def _spare(job: dict[str, Any]) -> AbstractContextManager[None]:
    """Order a spare for this worker, where the recipe wants it."""
    if not recipes.parse(job["recipe"]).spares:
        return nullcontext()
    return spare.ordered(ray.train.get_context().get_local_world_size())


def _context(job: dict[str, Any], rank: int, pulse: Pulse) -> Context:
    # More threads than cores make ranks wait for each other's; Ray leaves one to a worker that has only a GPU,
    # which an offloaded optimizer would have to do with.
    ranks_here = ray.train.get_context().get_local_world_size()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks_here))
    run_dir, recipe, prepared = Path(job["run_dir"]), recipes.parse(job["recipe"]), job["prepared"]
    world = World(num_workers=dist.get_world_size(), device=job["device"], half=job["half"])
    listener = _listener(job["bulletin"]) if rank == 0 else None
    audit = run_dir / "logs" / f"samples-rank-{rank}.jsonl"
    return Context(
        recipe=recipe,
        plan=make_plan(
            recipe,
            job["ds_config"],
            job["ds_name"],
            job["model_facts"],
            prepared.facts,
            world,
            storage.read_json(run_dir / HALVINGS),
        ),
        prepared=prepared,
        run_dir=run_dir,
        rank=rank,
        device=ray.train.torch.get_device(),
        recorder=Recorder(run_dir / "metrics.jsonl" if rank == 0 else None, listener),
        samples=Recorder(audit) if recipe.log_samples else None,
        wish=_Wishes(job["bulletin"]) if rank == 0 else str,
        pulse=pulse,
        token_flops=job["token_flops"],
    )


def _send_chatter_to(path: Path) -> None:
    """Keep what libraries print, also from C++, in the run directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    logging.basicConfig(stream=os.fdopen(os.dup(log), "a", buffering=1), level=logging.INFO, force=True)


def _tell(job: dict[str, Any], **event: Any) -> None:
    """Post an event, and wait until it is there."""
    ray.get(ray.get_actor(job["bulletin"]).post.remote(event))


class _Wishes:
    """What the driver wishes for, looked up by a thread of its own, so that no step waits for it."""

    def __init__(self, bulletin: str) -> None:
        self.wish, self.actor = "", ray.get_actor(bulletin)
        threading.Thread(target=self._look, daemon=True, name="wishes").start()

    def __call__(self) -> str:
        return self.wish

    def _look(self) -> None:
        while True:
            time.sleep(LOOK_EVERY_S)
            try:
                self.wish = ray.get(self.actor.asked.remote())
            except ray.exceptions.RayError:
                return  # The driver is gone, and this process goes with it.


def _listener(bulletin: str) -> Callable[[Event], None]:
    """Post events to the driver from a thread: a call by Ray takes longer than to write the record. Of steps only what
    a person can follow; for all others it waits until they are on their way, since the process may end after them."""
    actor = ray.get_actor(bulletin)
    posted_at_s = [0.0]
    waiting: queue.Queue[Event] = queue.Queue()

    def post() -> None:
        while True:
            event = waiting.get()
            try:
                actor.post.remote(event)
            except ray.exceptions.RayError:
                pass  # The driver is gone, and this process goes with it.
            except Exception:
                # Without this thread the next event would wait for ever.
                logging.getLogger(__name__).exception("not told to the driver: %s", event["kind"])
            finally:
                waiting.task_done()

    def listen(event: Event) -> None:
        now_s = time.monotonic()
        is_step = event["kind"] == "step"
        if is_step and now_s - posted_at_s[0] < POST_EVERY_S and event["step"] % 10:
            return
        posted_at_s[0] = now_s
        waiting.put(event)
        if not is_step:
            waiting.join()

    threading.Thread(target=post, daemon=True, name="posts").start()
    return listen
