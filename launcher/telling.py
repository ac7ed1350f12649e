"""What the record is told now and then, besides the steps: where a view can begin that comes later."""

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from launcher.report.record import Recorder

FIRST_AFTER_S, EVERY_S = 5.0, 30.0


def usage(
    recorder: Recorder,
    used: Any,
    *,
    stage: str,
    step: int,
    spent: Mapping[str, float],
    metrics: Mapping[str, Any],
    begun: Mapping[str, Any],
) -> None:
    """Write this worker's memory, and where the stage's time went.

    Args:
        recorder: of rank 0.
        used: `usage.Usage`: bytes at the peak.
        stage, step: where it is.
        spent: sums over the steps that this process made: samples, tokens, slots and seconds.
        metrics: of the last evaluation, by part.
        begun: what `stage_begin` said: that may be gigabytes before the record's end.
    """
    recorder.write(
        "usage",
        stage=stage,
        step=step,
        memory={"device": used.device, "host": used.host},
        spent={name: round(value, 3) for name, value in spent.items()},
        metrics=dict(metrics),
        begun=dict(begun),
    )


def num_nodes(device: torch.device) -> int:
    """Count the nodes of the group: each has one rank that is the first there; every rank must call it."""
    is_first = torch.tensor([int(os.environ.get("LOCAL_RANK", "0") == "0")], device=device)
    dist.all_reduce(is_first)
    return int(is_first.item())
