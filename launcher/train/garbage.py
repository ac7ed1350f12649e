"""Python's garbage collector, kept from stopping ranks in different steps: the others would wait each time."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

EVERY_STEPS = 50


@contextmanager
def held() -> Iterator[None]:
    """Let it run only when it is told to; what is there already, it does not look at."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def everything() -> None:
    """Collect all, where all ranks stand still anyway: what has outlived one collection is left by `after`."""
    gc.collect()


def after(step: int) -> None:
    """Collect what the last steps left behind, on all ranks after the same ones."""
    if step % EVERY_STEPS == 0:
        gc.collect(1)
