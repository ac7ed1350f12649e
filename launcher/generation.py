"""One generation of workers: from their start to their end by success, by a wish of the driver's, or by a failure."""

import logging
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

# Ray reads these when it is imported; what the user has set stays.
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# The driver looks at draining nodes itself, and lets the workers leave: Ray would wait for the node's end.
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")

import ray
import ray.exceptions
import ray.train
import ray.train.torch
from ray.train.v2._internal import constants
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2.api.callback import UserCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from launcher import bad_batches, errors, failures, hangs, pulse, rescue, spare, storage, worker
from launcher.errors import TrainingFailed
from launcher.report.record import Event
from launcher.report.view import View
from launcher.worker import HALVINGS

POLL_S = 0.2
LOST = (
    ray.exceptions.RayActorError,
    ray.exceptions.OutOfMemoryError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
"""What Ray raises in the place of a worker whose process or node is gone."""

Reason = Literal["done", "stop", "preempted", "grow", "lost"]
"""Why a generation ended: all is trained; the driver wished it; a process or node was lost."""


@ray.remote(num_cpus=0)
class Bulletin(pulse.Board):
    """Where workers post events and heartbeats, which the driver reads, and the driver wishes, which rank 0 reads."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.num_dropped = 0
        self.wish = ""

    def post(self, event: Event) -> None:
        """Add an event, with the time where it has none."""
        self.events.append({"time": round(time.time(), 3), **event})

    def read(self, start: int) -> list[Event]:
        """Return the events from number `start` on; those before it have been read, and are dropped."""
        del self.events[: start - self.num_dropped]
        self.num_dropped = start
        return self.events

    def ask(self, wish: str) -> None:
        """Wish that the workers save and leave at the next step; empty takes it back."""
        self.wish = wish

    def asked(self) -> str:
        """Return what is wished for."""
        return self.wish


class OnFailure(UserCallback):
    """Asks the policy what to do about failed workers, does it, and tells of it."""

    def __init__(self, policy: failures.Policy, bulletin: str, run_dir: Path, is_elastic: bool) -> None:
        self.policy, self.bulletin, self.run_dir, self.is_elastic = policy, bulletin, run_dir, is_elastic

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise to end the generation: Ray Train does not retry when a callback raises."""
        lost = {rank for rank, each in worker_exceptions.items() if isinstance(each, LOST)}
        said = {rank: f"{type(each).__name__}: {each}"[-10_000:] for rank, each in worker_exceptions.items()}
        self._post(kind="seen", said=said, is_lost=failures.is_about_loss(worker_exceptions, lost))
        hang = ray.get(ray.get_actor(self.bulletin).failed.remote())
        decision = self.policy.hung(*hang) if hang else self.policy.decide(worker_exceptions, lost)
        if isinstance(decision, failures.Stop):
            self._post(kind="stopped", type=type(decision.error).__name__, message=str(decision.error))
            raise decision.error
        if isinstance(decision, failures.Halve):
            known = storage.read_json(self.run_dir / HALVINGS) or {}
            known[decision.stage] = known.get(decision.stage, 0) + 1
            storage.write_json(self.run_dir / HALVINGS, known)
            self._post(kind="halved", stage=decision.stage, reason=decision.reason)
            return
        if isinstance(decision, failures.Rollback):
            bad_batches.pass_by(self.run_dir, decision.stage, decision.step)
            self._post(kind="rolled_back", stage=decision.stage, step=decision.step, reason=decision.reason)
            return
        # Where another number of workers may be there now, Ray would wait for the old one.
        ends = self.is_elastic and decision.is_lost
        if hang:
            self._post(kind="hung", stage=hang[1], step=hang[2], ends=ends)
        else:
            self._post(
                kind="failure", reason=decision.reason[:200], ranks=sorted(worker_exceptions), ends=ends
            )
        if ends:
            raise WorkersLost(decision.reason)

    def _post(self, **event: Any) -> None:
        ray.get(ray.get_actor(self.bulletin).post.remote(event))


class WorkersLost(Exception):
    """Ends a generation whose workers, or some of them, are gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """What a generation is started with.

    Attributes:
        job: for `worker.train`, but for the bulletin's name.
        num_workers: to start.
        on_gpu: whether each takes a GPU, else a CPU.
        run_dir: of the run.
        policy: decides about failures, over all generations.
        is_elastic: whether to end when workers are lost, instead of starting as many again.
        hang_minutes: as in the recipe; None: auto.
    """

    job: dict[str, Any]
    num_workers: int
    on_gpu: bool
    run_dir: Path
    policy: failures.Policy
    is_elastic: bool
    hang_minutes: float | None = None


def env_vars(*, on_gpu: bool) -> dict[str, str]:
    """Return what the workers' environment has beside the job's, all of it: a spare's has to be the same."""
    # Workers need the compiler's helpers of this environment on their path, activated or not.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = {"PATH": path, "TOKENIZERS_PARALLELISM": "true"} | spare.environment()
    # As Ray Train adds them for its controller, whose environment the workers inherit.
    warns = constants.RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR
    found |= {warns: constants.DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE}
    found |= constants.get_env_vars_to_propagate()
    return found if on_gpu else found | {"DS_ACCELERATOR": "cpu"}


class Watch(Protocol):
    """What looks after a generation while it trains."""

    def look(self, generation: "Generation") -> None: ...
    def interrupt(self, generation: "Generation") -> None: ...


class Generation:
    """Workers in training, seen from the driver."""

    def __init__(self, group: Group, view: View) -> None:
        self.group, self.view = group, view
        name = f"bulletin-{uuid.uuid4().hex[:12]}"
        # Beside the driver: on a worker's node it would go with that.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.bulletin = Bulletin.options(name=name, scheduling_strategy=here).remote()  # type: ignore[attr-defined]
        self.trainer = _trainer(group, name)
        self.events: list[Event] = []
        self.num_read = 0
        self.failure: BaseException | None = None
        self.ended = threading.Event()
        self.rescue = rescue.Rescue(
            self.bulletin, group.num_workers, group.run_dir, group.hang_minutes, view.say
        )
        self.thread = threading.Thread(target=self._fit, daemon=True, name="fit")

    def run(self, watch: "Watch") -> Reason:
        """Train until this generation ends; show its events meanwhile.

        Args:
            watch: is called all the while; may `ask`.

        Returns:
            Why it ended.

        Raises:
            LauncherError: it cannot go on.
        """
        self.thread.start()
        with self._shown():
            # Not the thread's join: an interrupt in it makes Python take the thread for ended.
            while not self.ended.is_set():
                try:
                    self.ended.wait(POLL_S)
                    watch.look(self)
                    self.rescue.look()
                except KeyboardInterrupt:
                    watch.interrupt(self)
        if self.failure is None:
            left = [event for event in self.events if event["kind"] == "left"]
            return left[-1]["reason"] if left else "done"
        if self._is_lost():
            return "lost"
        raise self._cause() from self.failure

    def ask(self, wish: Reason) -> None:
        """Wish that the workers save at the next step and leave."""
        ray.get(self.bulletin.ask.remote(wish))

    @property
    def has_begun(self) -> bool:
        """Whether the workers have come to a stage."""
        return any(event["kind"] == "stage_begin" for event in self.events)

    @property
    def num_failures(self) -> int:
        """How often workers failed."""
        return sum(event["kind"] == "failure" for event in self.events)

    @property
    def hangs(self) -> list[tuple[str, int]]:
        """The stage and the step of every hang that the workers were restarted for."""
        return [(event["stage"], event["step"]) for event in self.events if event["kind"] == "hung"]

    @property
    def nodes(self) -> set[str]:
        """The nodes of its workers, as far as these have told."""
        return {event["node"] for event in self.events if event["kind"] == "worker"}

    def _keep(self, event: Event) -> None:
        """Keep an event; of steps in a row the first and the last, since a run makes millions."""
        if all(each["kind"] == "step" for each in (event, *self.events[-2:])) and len(self.events) > 1:
            self.events.pop()
        self.events.append(event)

    def _fit(self) -> None:
        try:
            self.trainer.fit()
        except BaseException as failure:
            self.failure = failure
        finally:
            self.ended.set()

    def _is_lost(self) -> bool:
        if any(event["kind"] in ("stopped", "error") for event in self.events):
            return False
        # Ray could not start as many workers again as there were.
        inner = getattr(self.failure, "controller_failure", None)
        is_missing = isinstance(inner, WorkerGroupStartupFailedError | WorkerGroupStartupTimeoutError)
        return is_missing or any(event.get("ends") for event in self.events)

    def _cause(self) -> Exception:
        """Why the run was ended; else the last error that a worker reported; else what Ray says."""
        told = [e for e in self.events if e["kind"] == "stopped"] or [
            e for e in self.events if e["kind"] == "error"
        ]
        if told:
            kind = getattr(errors, told[-1]["type"], TrainingFailed)
            return kind(told[-1]["message"])  # type: ignore[no-any-return]
        workers = getattr(self.failure, "worker_failures", {}) or {}
        first = next(iter(workers.values()), self.failure)
        return TrainingFailed(
            f"the workers could not go on; the last error: {failures.last_line(first)} (logs:"
            f" {self.group.run_dir / 'logs'}). The same command continues from the last checkpoint"
        )

    @contextmanager
    def _shown(self) -> Iterator[None]:
        """Show the events that workers post, from a thread, until the block ends; then the rest of them."""
        stop = threading.Event()

        def drain() -> None:
            for event in ray.get(self.bulletin.read.remote(self.num_read), timeout=30):
                self.num_read += 1
                self._keep(event)
                self.view.show(event)

        def poll() -> None:
            while not stop.wait(POLL_S):
                try:
                    drain()
                except Exception as error:  # The view must never end a run.
                    logging.getLogger(__name__).warning("progress: %s", error)

        thread = threading.Thread(target=poll, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            drain()
            self.view.end_line()


def _trainer(group: Group, bulletin: str) -> Any:
    return ray.train.torch.TorchTrainer(
        worker.train,
        train_loop_config=group.job | {"bulletin": bulletin},
        torch_config=ray.train.torch.TorchConfig(
            backend="nccl" if group.on_gpu else "gloo",
            timeout_s=hangs.collective_timeout_s(group.hang_minutes),
        ),
        scaling_config=ray.train.ScalingConfig(num_workers=group.num_workers, use_gpu=group.on_gpu),
        run_config=ray.train.RunConfig(
            # A name of its own each time: what Ray keeps is never needed to continue, and a damaged
            # snapshot of an earlier try must not stop this one.
            name=uuid.uuid4().hex[:12],
            storage_path=str(group.run_dir / "logs" / "ray"),
            failure_config=ray.train.FailureConfig(
                max_failures=-1,  # Counted by our own policy, which knows the causes.
                controller_failure_limit=0,
            ),
            callbacks=[OnFailure(group.policy, bulletin, group.run_dir, group.is_elastic)],
            worker_runtime_env={"env_vars": env_vars(on_gpu=group.on_gpu)},
        ),
    )
