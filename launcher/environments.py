"""The environments in which Ray Train's processes start, to the letter: one that was made ready is taken only for its own."""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import ray

from launcher import spare

# Ray Train reads these when it is imported, and hands them on; what the user has set stays.
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# The driver looks at draining nodes itself, and lets the workers leave: Ray would wait for the node's end.
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")


def of_tasks() -> dict[str, str]:
    """Return what those of looking ahead and of the preparation have: one process can do both."""
    return {spare.KIND: "task"}


def of_verification() -> dict[str, str]:
    """Return what that of exports has: as no other process of the run, so that none is taken that has done something."""
    return of_tasks() | {"LAUNCHER_VERIFIES": "1"}


def of_workers(*, on_gpu: bool) -> dict[str, str]:
    """Return what the workers' environment has beside the job's, all of it."""
    # Workers need the compiler's helpers of this environment on their path, activated or not.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    of_ray_train: dict[str, str] = _ray_trains().get_env_vars_to_propagate()
    found = {"PATH": path, "TOKENIZERS_PARALLELISM": "true", spare.KIND: "worker"} | of_ray_train
    return found if on_gpu else found | {"DS_ACCELERATOR": "cpu"}


def _ray_trains() -> Any:
    """Ray Train's constants by their file: its package imports pandas and more, before the processes could be ordered."""
    path = Path(ray.__file__).parent / "train" / "v2" / "_internal" / "constants.py"
    spec = importlib.util.spec_from_file_location("ray_train_constants", path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
