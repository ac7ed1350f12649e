"""The job seen from outside: the cluster, the preparation, Ray Train with its policies, how it ended."""

import logging
import os
import signal
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Ray reads these when it is imported; what the user has set stays.
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
import ray.exceptions
import ray.train
import ray.train.torch
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
from ray.train.v2.api.callback import UserCallback

from launcher import errors, failures, storage, tasks, worker
from launcher import recipe as recipes
from launcher.errors import ClusterError, ExportFailed, TrainingFailed
from launcher.facts import Prepared
from launcher.outlook import Outlook
from launcher.plan.plan import ModelFacts, World
from launcher.recipe import Recipe
from launcher.report import memory
from launcher.report import summary as report
from launcher.report.record import Event
from launcher.report.view import View
from launcher.stage import AFTER, DONE
from launcher.worker import HALVINGS

COLLECTIVE_TIMEOUT_S = 1800
POLL_S = 0.2
LOST = (ray.exceptions.RayActorError, WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError)
"""What Ray raises in the place of a worker whose process or node is gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run as the command line resolved it."""

    recipe: Recipe
    ds_config: dict[str, Any]
    ds_name: str
    model_facts: ModelFacts
    run_dir: Path
    outlook: Outlook


@ray.remote(num_cpus=0)
class Bulletin:
    """Where workers post events and the driver reads them."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def post(self, event: Event) -> None:
        """Add an event."""
        self.events.append(event)

    def read(self, start: int) -> list[Event]:
        """Return the events from number `start` on."""
        return self.events[start:]


class OnFailure(UserCallback):
    """Asks the policy what to do about failed workers, does it, and tells of it."""

    def __init__(self, policy: failures.Policy, bulletin: str, run_dir: Path) -> None:
        self.policy, self.bulletin, self.run_dir = policy, bulletin, run_dir

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise to end the run: Ray Train does not retry when a callback raises."""
        lost = {rank for rank, each in worker_exceptions.items() if isinstance(each, LOST)}
        decision = self.policy.decide(worker_exceptions, lost)
        if isinstance(decision, failures.Stop):
            self._post(kind="stopped", type=type(decision.error).__name__, message=str(decision.error))
            raise decision.error
        if isinstance(decision, failures.Halve):
            known = storage.read_json(self.run_dir / HALVINGS) or {}
            known[decision.stage] = known.get(decision.stage, 0) + 1
            storage.write_json(self.run_dir / HALVINGS, known)
            self._post(kind="halved", stage=decision.stage, reason=decision.reason)
            return
        self._post(kind="failure", reason=decision.reason[:200], ranks=sorted(worker_exceptions))

    def _post(self, **event: Any) -> None:
        ray.get(ray.get_actor(self.bulletin).post.remote(event))


@contextmanager
def cluster(address: str | None, num_workers: int | None) -> Iterator[World]:
    """Join the cluster that is meant, or start one on this machine; yield the workers to use.

    Raises:
        ClusterError: the cluster cannot be reached, or never can hold the workers.
    """
    _connect(address, num_workers)
    try:
        yield _world(num_workers)
    finally:
        ray.shutdown()


def run(job: Job, world: World, view: View, prepared: Prepared) -> dict[str, Any]:
    """Train, verify and sum up.

    Returns:
        The summary that is also written to summary.json.

    Raises:
        LauncherError: whatever a worker met first.
    """
    bulletin_name = f"bulletin-{uuid.uuid4().hex[:12]}"
    bulletin = Bulletin.options(name=bulletin_name).remote()
    with _shown(bulletin, view):
        try:
            _trainer(job, world, prepared, bulletin_name).fit()
        except SystemExit:
            # How Ray Train ends on SIGINT, whose handler it replaces.
            raise KeyboardInterrupt from None
        except Exception as failure:
            raise _cause(failure, ray.get(bulletin.read.remote(0)), job) from failure
    return _finish(job, world, prepared, view)


def _connect(address: str | None, num_workers: int | None) -> None:
    logging.getLogger("ray").setLevel(logging.ERROR)
    address = address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    root = Path(__file__).resolve().parent
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ or "RAY_JOB_ID" in os.environ
    if address is None and not in_job:
        cpus = os.cpu_count() or 1
        wanted = max(cpus, num_workers or 0)
        environment = {"PYTHONPATH": os.pathsep.join([str(root.parent), os.environ.get("PYTHONPATH", "")])}
        options |= {"address": "local", "num_cpus": wanted, "runtime_env": {"env_vars": environment}}
    else:
        options["address"] = address or "auto"
        if root.parent != Path.cwd() or not in_job:
            # The package travels with the run, so that driver and workers hold the same code.
            options["runtime_env"] = {"py_modules": [str(root)]}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
        # Ray puts a handler of its own in place, which prints a native stack trace over our last words.
        signal.signal(signal.SIGTERM, handler)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        reason = str(error).splitlines()[0]
        raise ClusterError(f"cannot reach a Ray cluster at {options['address']}: {reason}") from None


def _world(num_workers: int | None) -> World:
    resources = ray.cluster_resources()
    num_gpus, num_cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    device = "cuda" if num_gpus else "cpu"
    available = num_gpus or num_cpus
    wanted = num_workers or (num_gpus or min(2, num_cpus))
    if wanted < 1:
        raise ClusterError("the cluster has neither CPUs nor GPUs to run workers on")
    if wanted > available:
        kind = "GPUs" if num_gpus else "CPUs"
        raise ClusterError(
            f"--workers {wanted}, but the cluster has {available} {kind}: ask for at most that"
        )
    return World(num_workers=wanted, device=device)  # type: ignore[arg-type]


def _trainer(job: Job, world: World, prepared: Prepared, bulletin: str) -> Any:
    on_gpu = world.device == "cuda"
    config = {
        "recipe": recipes.dump(job.recipe),
        "ds_config": job.ds_config,
        "ds_name": job.ds_name,
        "model_facts": job.model_facts,
        "prepared": prepared,
        "run_dir": str(job.run_dir),
        "device": world.device,
        "bulletin": bulletin,
        "predicted": job.outlook.predicted(),
    }
    # Workers need the compiler's helpers of this environment on their path, activated or not.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {"PATH": path, "TOKENIZERS_PARALLELISM": "true"}
    if not on_gpu:
        environment["DS_ACCELERATOR"] = "cpu"
    policy = failures.Policy(job.recipe.max_failures, job.recipe.on_oom, str(job.run_dir / "logs"))
    return ray.train.torch.TorchTrainer(
        worker.train,
        train_loop_config=config,
        torch_config=ray.train.torch.TorchConfig(
            backend="nccl" if on_gpu else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S
        ),
        scaling_config=ray.train.ScalingConfig(num_workers=world.num_workers, use_gpu=on_gpu),
        run_config=ray.train.RunConfig(
            # A name of its own each time: what Ray keeps is never needed to continue, and a damaged
            # snapshot of an earlier try must not stop this one.
            name=uuid.uuid4().hex[:12],
            storage_path=str(job.run_dir / "logs" / "ray"),
            failure_config=ray.train.FailureConfig(
                max_failures=-1,  # Counted by our own policy, which knows the causes.
                controller_failure_limit=0,
            ),
            callbacks=[OnFailure(policy, bulletin, job.run_dir)],
            worker_runtime_env={"env_vars": environment},
        ),
    )


@contextmanager
def _shown(bulletin: Any, view: View) -> Iterator[None]:
    """Show the events that workers post, from a thread, until the block ends; then the rest of them."""
    stop = threading.Event()
    shown = 0

    def drain() -> None:
        nonlocal shown
        for event in ray.get(bulletin.read.remote(shown), timeout=30):
            view.show(event)
            shown += 1

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
        view.end_line()


def _cause(failure: Exception, events: list[Event], job: Job) -> Exception:
    """Why the run was ended; else the last error that a worker reported; else what Ray says."""
    told = [e for e in events if e["kind"] == "stopped"] or [e for e in events if e["kind"] == "error"]
    if told:
        kind = getattr(errors, told[-1]["type"], TrainingFailed)
        return kind(told[-1]["message"])  # type: ignore[no-any-return]
    workers = getattr(failure, "worker_failures", {}) or {}
    first = next(iter(workers.values()), failure)
    return TrainingFailed(
        f"the workers could not go on; the last error: {failures.last_line(first)} (logs:"
        f" {job.run_dir / 'logs'}). The same command continues from the last checkpoint"
    )


def _finish(job: Job, world: World, prepared: Prepared, view: View) -> dict[str, Any]:
    """Verify every export in a fresh process, and write the summary."""
    differences = _verified(job)
    stages: dict[str, Any] = {}
    for name in [stage.name for stage in job.recipe.stages] + (["baseline"] if job.recipe.baseline else []):
        folder = job.run_dir / "stages" / name
        stages[name] = storage.read_json(folder / DONE) or {}
        if (after := storage.read_json(folder / AFTER)) is not None:
            stages[name]["after"] = after["metrics"]
        predicted, used = job.outlook.predicted().get(name, {}), stages[name].get("memory", {})
        stages[name]["memory"] = memory.comparison(predicted, used)
        if name in differences:
            stages[name] |= {"export": str(folder / "export"), "verified": differences[name]}
    view.say("exports verified: read back in a fresh process, the same logits as trained")
    task = tasks.create(job.recipe.stages[-1])
    for name, stage in zip(stages, job.recipe.stages, strict=False):
        stages[name] |= {"notes": notes} if (notes := tasks.create(stage).notes()) else {}
    summary: dict[str, Any] = {"stages": stages, "num_workers": world.num_workers, "device": world.device}
    if halvings := storage.read_json(job.run_dir / HALVINGS):
        summary["halvings"] = halvings
    is_joint = job.recipe.transfer == "joint"
    if transfer := report.transfer(stages, task.metric, is_joint=is_joint):
        summary["transfer"] = transfer
    storage.write_json(job.run_dir / "summary.json", summary)
    return summary


def _verified(job: Job) -> dict[str, float]:
    """Return each stage's largest relative difference of logits, exported against trained."""
    from launcher.verify import verify_stage

    task = ray.remote(num_cpus=1, max_calls=1)(verify_stage)
    pending = {
        stage.name: task.remote(recipes.dump_stage(stage), str(job.run_dir / "stages" / stage.name))
        for stage in job.recipe.stages
    }
    results = dict(zip(pending, ray.get(list(pending.values())), strict=True))
    for result in results.values():
        if isinstance(result, ExportFailed):
            raise result
    return results
