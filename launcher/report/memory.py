"""Memory predicted and used, in words."""

from typing import Any, Protocol

from launcher.plan.plan import StagePlan
from launcher.report.forecast import size

Bytes = dict[str, int | None]
LITTLE = 512 << 20


class Used(Protocol):
    """Bytes at the peak."""

    @property
    def device(self) -> int | None: ...
    @property
    def host(self) -> int: ...


def out_of_memory(plan: StagePlan, predicted: Bytes, used: Used, room: int, *, rank: int, host: str) -> str:
    """Return what a worker says that ran out of memory.

    Args:
        plan: of the stage it was in.
        predicted: bytes at the peak, by `device` and `host`; empty: there was no forecast.
        used: what it reached.
        room: all there is of what ran out.
        rank: of the worker.
        host: its machine.
    """
    place = "host" if used.device is None else "device"
    what = "host" if used.device is None else "GPU"
    forecast = predicted.get(place)
    said = f"{size(forecast)} predicted, " if forecast else "no forecast, "
    peak = used.host if used.device is None else used.device
    remedy = "activation_checkpointing: true, a ds config that shards or offloads more (--ds auto), shorter samples"
    if plan.can_halve:
        remedy = "on_oom: shrink goes on with half of it; or " + remedy
    return (
        f"stage {plan.name} ran out of {what} memory on rank {rank} ({host}): {said}{size(peak)} used of"
        f" {size(room)}, with a micro-batch of {plan.micro_batch} {plan.unit}: {remedy}"
    )


def comparison(predicted: Bytes, used: Bytes) -> dict[str, Any]:
    """Return predicted and used bytes of each worker and their ratio, for each place with both.

    Of the host the system tells whole processes: little is hidden by what libraries take, and tells nothing.
    """
    found = {}
    for place in ("device", "host"):
        said, was = predicted.get(place), used.get(place)
        if said and was and (place == "device" or said >= LITTLE):
            found[place] = {"predicted": said, "used": was, "ratio": round(said / was, 3)}
    return found


def line(compared: dict[str, Any]) -> str:
    """Return a comparison in words; empty where there is none."""
    names = {"device": "GPU", "host": "host"}
    parts = [
        f"{names[place]} {size(each['predicted'])} predicted, {size(each['used'])} used"
        for place, each in compared.items()
    ]
    return f"memory of a worker: {'; '.join(parts)}" if parts else ""
