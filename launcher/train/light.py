"""DeepSpeed without what no run needs. To be imported before DeepSpeed makes an engine or begins to communicate.

Its Muon optimizer is imported for every engine, to ask whether the optimizer is that one; and it has torch.compile's
decorator on functions, which brings in torch's compiler: 600 modules, more than a second of a core. Here that waits for
Muon's first step. And on CPUs its communication builds and loads an op that only inference uses, by shared memory: left
out, no first run waits two minutes for a compiler.
"""

import functools
from collections.abc import Callable
from typing import Any

import deepspeed.ops
import torch


def _later(function: Callable[..., Any]) -> Callable[..., Any]:
    """As `torch.compile`, but at the first call."""
    made: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not made:
            made.append(_compile(function))
        return made[0](*args, **kwargs)

    return run


_compile = torch.compile
torch.compile = _later  # type: ignore[assignment]
try:
    import deepspeed.runtime.zero.muon.muon_optimizer
finally:
    torch.compile = _compile

# Where this says that the op cannot be had (deepspeed.comm.torch.build_shm_op), DeepSpeed goes on without it, and without
# trying all the others first.
deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
