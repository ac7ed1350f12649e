"""Every collective of a rank, counted and timed."""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

NAMES = ("all_reduce", "reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast", "barrier")


class Tally:
    """What the collectives of torch.distributed came to since `begin`; made before DeepSpeed takes hold of them.

    Attributes:
        calls, bytes: by name: how many, and of the whole tensors.
        waited_s: while this rank's main thread waited for one.
    """

    def __init__(self) -> None:
        self.begin()
        for name in NAMES:
            setattr(dist, name, self._counted(name, getattr(dist, name)))

    def begin(self) -> None:
        """Start anew."""
        self.calls: dict[str, int] = {}
        self.bytes: dict[str, int] = {}
        self.waited_s = 0.0

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)]
            self.calls[name] = self.calls.get(name, 0) + 1
            most = max((each.numel() * each.element_size() for each in tensors), default=0)
            self.bytes[name] = self.bytes.get(name, 0) + most
            begun_s = time.perf_counter()
            work = real(*args, **kwargs)
            self.waited_s += time.perf_counter() - begun_s
            return _Timed(self, work) if kwargs.get("async_op") else work

        return call


class _Timed:
    """A collective under way."""

    def __init__(self, tally: Tally, work: Any) -> None:
        self.tally, self.work = tally, work

    def wait(self, *args: Any) -> Any:
        """Wait for it, and count that."""
        begun_s = time.perf_counter()
        done = self.work.wait(*args)
        self.tally.waited_s += time.perf_counter() - begun_s
        return done

    def is_completed(self) -> bool:
        """Whether it is done."""
        return bool(self.work.is_completed())
