"""A group of workers as Ray Train is to start it."""

import asyncio
import logging
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.exceptions

from launcher import environments  # isort: skip

# After `environments`, which sets what it reads.
import ray.train
from ray._private.log import PlainRayHandler
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2._internal.execution.worker_group import state as of_states
from ray.train.v2._internal.execution.worker_group import worker_group as of_groups
from ray.train.v2.api.callback import UserCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from launcher import bad_batches, failures, hangs, storage
from launcher.collectives import Collectives
from launcher.files import HALVINGS

LOST = (
    ray.exceptions.RayActorError,
    ray.exceptions.OutOfMemoryError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
"""What Ray raises in the place of a worker whose process or node is gone."""
NOT_STARTED = (WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError)
"""What Ray raises where it could not start as many workers as it was to."""


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


def trainer(group: Group, bulletin: str) -> Any:
    """Return what starts the workers."""
    return _Trainer(
        _train,
        train_loop_config=group.job | {"bulletin": bulletin},
        backend_config=Collectives(
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
            worker_runtime_env={"env_vars": environments.of_workers(on_gpu=group.on_gpu)},
        ),
    )


class _Trainer(DataParallelTrainer):
    """Ray Train's, without the actors of its own, of 150 MB and more than a second of a core each."""

    def _create_default_callbacks(self) -> list[Any]:
        return [each for each in super()._create_default_callbacks() if not isinstance(each, _UNNEEDED)]

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        """Run Ray Train's controller here, not in an actor: it has nothing to outlive the driver for."""
        options["scaling_policy"] = _SoMany(self.scaling_config)
        controller = _Controller(**options)
        # What it logs is in the files of Ray's session, as an actor's is; the terminal is the view's.
        logger = logging.getLogger("ray.train")
        for handler in [each for each in logger.handlers if isinstance(each, PlainRayHandler)]:
            logger.removeHandler(handler)
        asyncio.run(controller.run())
        return controller.get_result()


# We give no Ray datasets to hand out; and the workers' places go with the driver, where the controller is.
_UNNEEDED = (DatasetsCallback, PlacementGroupCleanerCallback)


class _SoMany(FixedScalingPolicy):
    """Ray Train's, without its actor that asks for nodes: waiting placement groups and our driver do (autoscaler.py)."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Ask nobody."""

    def _maybe_send_resource_request(self) -> None:
        """Ask nobody."""


class _NoActor:
    """In the place of the one through which workers agree on Ray's checkpoints: they have torch's collectives."""

    @classmethod
    def options(cls, **_: Any) -> "type[_NoActor]":
        """See Ray."""
        return cls

    @classmethod
    def remote(cls, **_: Any) -> "type[_NoActor]":
        """See Ray."""
        return cls

    @classmethod
    def end(cls, _: Any) -> None:
        """End nothing."""


# Ray Train has no switch for it; all worker groups of this process are ours.
of_groups.SynchronizationActor = _NoActor
of_states._shutdown_sync_actor = _NoActor.end


class _WorkerGroup(WorkerGroup):
    """Ray Train's, whose controller is no actor: workers could ask it for Ray's checkpoints alone, and have their own."""

    def _init_train_context_on_workers(
        self, workers: list[Any], sync_actor: Any, train_context_args: dict[str, list[Any]]
    ) -> None:
        begun = [
            worker.actor.init_train_context.remote(
                train_run_context=self._train_run_context,
                distributed_context=worker.distributed_context,
                synchronization_actor=sync_actor,
                storage_context=self._storage_context,
                worker_callbacks=self._worker_callbacks_to_propagate,
                controller_actor=None,
                **{name: values[i] for name, values in train_context_args.items()},
            )
            for i, worker in enumerate(workers)
        ]
        ray.get(begun)
        self._decorate_worker_log_file_paths(workers)


class _Controller(TrainController):
    """Ray Train's, with such workers."""

    worker_group_cls = _WorkerGroup


def _train(job: dict[str, Any]) -> None:
    """Train, on a worker: here, so that the driver does not import what workers do."""
    from launcher import worker

    worker.train(job)
