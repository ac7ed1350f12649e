"""What a device can do at best, as products of matrices show: what model FLOPs are compared with."""

import time
from functools import cache

import torch

from launcher.train.model import DTYPES

_SIDE = {"cpu": 768, "cuda": 8192}
_TIMES = 6


@cache
def flops(device: torch.device, dtype: str) -> float:
    """Return the floating-point operations a second of this process in large products of matrices: the best of a few.

    It takes about 50 ms, and on a GPU half a GB for a moment: to be called before anything else is there. Ranks on one
    machine measure at the same time, as they train. 0: it could not be measured.

    Args:
        device: of this rank.
        dtype: fp32, bf16 or fp16; fp32 on a GPU is TF32 where torch is told so.
    """
    try:
        return _measured(device, dtype)
    except RuntimeError:  # No memory, or no such product on this device: nothing that training needs.
        return 0.0


def _measured(device: torch.device, dtype: str) -> float:
    side = _SIDE[device.type]
    left = torch.ones(side, side, device=device, dtype=DTYPES[dtype])
    out = torch.empty_like(left)
    best_s = float("inf")
    for _ in range(_TIMES):
        _wait(device)
        begun_s = time.perf_counter()
        torch.mm(left, left, out=out)
        _wait(device)
        best_s = min(best_s, time.perf_counter() - begun_s)
    del left, out
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return 2 * side**3 / best_s


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
