"""Imports without what nobody needs: a start is made of imports more than of anything else."""

import contextlib
import gc
import importlib
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

UNNEEDED = ("mlflow", "scipy", "sklearn", "boto3")
"""What libraries import where it happens to be installed, and a run has no use for: DeepSpeed's autotuner takes mlflow,
transformers' losses of object detection scipy, its assisted generation sklearn, which has scipy, and Accelerate's questions
about SageMaker boto3. Each of the first two costs as much as a third of torch."""


@contextmanager
def imports() -> Iterator[None]:
    """Import within the block as if what is unneeded were not installed, and without looking for garbage.

    Afterwards everything can be imported again. What was imported stays for as long as the process does, so no look for
    garbage goes through it until a stage has ended: DeepSpeed makes one in each start, which took half a second.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        # A look for GPUs through the driver would settle which there are, before Ray has said which are this worker's.
        with without(*UNNEEDED), _set("PYTORCH_NVML_BASED_CUDA_CHECK", "1"):
            yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()


def load(modules: Iterable[str]) -> None:
    """Import modules. What cannot be imported fails again where it is used, and is told there."""
    for module in modules:
        with contextlib.suppress(Exception):
            importlib.import_module(module)


@contextmanager
def without(*names: str) -> Iterator[None]:
    """Have libraries find within the block that these others are not installed, unless they are imported already."""
    hidden = [name for name in names if name not in sys.modules]
    # A module that is None is one that cannot be found (Python's language reference, 5.3.1).
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            if sys.modules.get(name, name) is None:
                del sys.modules[name]


@contextmanager
def _set(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
