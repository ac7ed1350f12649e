"""How long a rank stands in collectives: in calls that block, and in waiting for those that do not."""

import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

_NAMES = (
    "all_reduce",
    "reduce_scatter_tensor",
    "reduce_scatter_single",
    "all_gather_into_tensor",
    "all_gather_single",
    "all_gather",
    "broadcast",
    "barrier",
)


class Clock:
    """The seconds so far."""

    def __init__(self) -> None:
        self.seconds, self._depth = 0.0, 0

    def watch(self) -> None:
        """Begin: DeepSpeed and the launcher call torch's collectives by their names in its module."""
        for name in _NAMES:
            if hasattr(dist, name):
                setattr(dist, name, self._timed(getattr(dist, name)))

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            handle = self._spend(lambda: call(*args, **kwargs))
            return _Waiting(handle, self) if hasattr(handle, "wait") else handle

        return timed

    def _spend(self, act: Callable[[], Any]) -> Any:
        begun_s = time.perf_counter()
        self._depth += 1
        try:
            return act()
        finally:
            self._depth -= 1
            if not self._depth:  # Collectives that are made of others are not counted twice.
                self.seconds += time.perf_counter() - begun_s


class _Waiting:
    """A collective's handle whose waiting is counted."""

    def __init__(self, handle: Any, clock: Clock) -> None:
        self._handle, self._clock = handle, clock

    def wait(self, *args: Any) -> Any:
        return self._clock._spend(lambda: self._handle.wait(*args))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)
