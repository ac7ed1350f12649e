"""Every collective of a rank, counted, timed, or left out."""

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
        leaves_out: whether they return at once, without the others' data.
    """

    def __init__(self) -> None:
        self.leaves_out = False
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
            if self.leaves_out:
                _own_part(name, tensors)
                return _Done()
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


class _Done:
    """One that was left out."""

    def wait(self, *_: Any) -> bool:
        """Return at once."""
        return True

    def is_completed(self) -> bool:
        """It is."""
        return True


def _own_part(name: str, tensors: list[torch.Tensor]) -> None:
    """Fill in what this rank has, so that no number is left as memory had it."""
    if name == "all_gather_into_tensor":
        whole, own = tensors[0].view(-1), tensors[1].view(-1)
        whole.view(-1, own.numel())[:] = own
    elif name == "reduce_scatter_tensor":
        tensors[0].view(-1).copy_(tensors[1].view(-1)[: tensors[0].numel()])
