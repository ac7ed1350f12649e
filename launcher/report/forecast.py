"""A forecast in words: the table of memory, what a run sends, takes and costs, and the verdict."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from launcher.plan.choose import Way
from launcher.plan.cluster import Cluster
from launcher.plan.forecast import Forecast, disk_bytes, total_s
from launcher.plan.need import PHASES

GIB, MIB = 1 << 30, 1 << 20
WORTH_SAYING = 0.1
"""Of a step: a smaller share of waiting is not told."""


def lines(forecasts: Sequence[Forecast], cluster: Cluster) -> list[str]:
    """Return the forecast of a run: the stage that needs most in full, the others in a line each."""
    tight = tightest(forecasts)
    result = [f"forecast for {cluster.describe()}", *_table(tight, cluster)]
    for each in forecasts:
        result.append(f"  {each.name}: {_in_short(each, cluster)}")
    result.append(_cost(forecasts, cluster))
    result.append(verdict(forecasts, cluster))
    return result


def tightest(forecasts: Sequence[Forecast]) -> Forecast:
    """Return the stage that fits worst."""
    return max(forecasts, key=lambda each: (max(_shares(each)), each.device_bytes))


def verdict(forecasts: Sequence[Forecast], cluster: Cluster) -> str:
    """Return whether a run fits, and what is tightest."""
    tight = tightest(forecasts)
    device, host = _shares(tight)
    if device == host == 0:
        return "verdict: the memory of these machines is not known"
    place = "device" if device >= host and cluster.accelerator else "host"
    room = tight.device_room if place == "device" else tight.host_room
    used = tight.device_bytes if place == "device" else tight.host_bytes
    what = "each GPU" if place == "device" else "each host"
    on = "device" if cluster.accelerator is None else place
    item = tight.need.tightest(on)
    said = "it fits" if tight.fits else "it does not fit"
    return (
        f"verdict: {said}: {what} needs {size(used)} of the {size(room or 0)} that can be planned with; the"
        f" tightest is {item.name} with {size(item.bytes)} ({item.why})"
    )


def way_line(way: Way) -> str:
    """Return a way to run in one line: what to change, and what it then needs."""
    tight = tightest(way.forecasts)
    host = f", host {_of(tight.host_bytes, tight.host_room)}" if tight.host_bytes else ""
    takes = f", about {_time(way.total_s)}" if way.total_s else ""
    gpu = f"GPU {_of(tight.device_bytes, tight.device_room)}" if way.cluster.accelerator else ""
    return f"{', '.join(way.says) or 'as it is'}: {gpu}{host}{takes}".replace(": ,", ":")


def tree(forecasts: Sequence[Forecast], cluster: Cluster) -> dict[str, Any]:
    """Return the forecast as JSON values."""
    return {
        "cluster": asdict(cluster),
        "fits": all(each.fits for each in forecasts),
        "stages": {
            each.name: {
                "items": [asdict(item) for item in each.need.items],
                "device_bytes": each.device_bytes,
                "device_room": each.device_room,
                "of_worker": each.of_worker,
                "host_bytes": each.host_bytes,
                "host_room": each.host_room,
                "checkpoint_bytes": each.checkpoint_bytes,
                "export_bytes": each.export_bytes,
                "sent_bytes_per_step": each.sent_bytes,
                "flops_per_step": each.flops,
                "step_s": each.step_s,
                "waits_s": None if each.pace is None else each.pace.waits_s,
                "num_steps": each.num_steps,
            }
            for each in forecasts
        },
    }


def _table(forecast: Forecast, cluster: Cluster) -> list[str]:
    unit = GIB if forecast.device_bytes + forecast.host_bytes >= 2 * GIB else MIB
    name = "GiB" if unit == GIB else "MiB"
    head = f"  memory of each worker in stage {forecast.name}, {name}"
    rows = [f"{head:<46}" + "".join(f"{phase:>9}" for phase in PHASES)]
    for place in ("device", "host"):
        items = [item for item in forecast.need.items if item.place == place]
        for item in sorted(items, key=lambda item: -item.bytes):
            cells = "".join(
                f"{item.bytes / unit:9.1f}" if phase in item.phases else f"{'':>9}" for phase in PHASES
            )
            where = " (host)" if place == "host" and cluster.accelerator else ""
            rows.append(f"    {item.name + where:<42}{cells}")
        if items and (place == "device" or cluster.accelerator):
            sums = "".join(f"{forecast.need.at(phase, place) / unit:9.1f}" for phase in PHASES)
            rows.append(
                f"    {'all of ' + ('a worker' if place == 'device' else 'a host, a worker'):<42}{sums}"
            )
    return rows


def _in_short(forecast: Forecast, cluster: Cluster) -> str:
    gpu = f"GPU {_of(forecast.device_bytes, forecast.device_room)}, " if cluster.accelerator else ""
    host = f"host {_of(forecast.host_bytes, forecast.host_room)}, " if forecast.host_bytes else ""
    step = f", about {_time(forecast.step_s)} a step" if forecast.step_s else ""
    if forecast.pace is not None and forecast.pace.waits_s > WORTH_SAYING * forecast.pace.step_s:
        step += f", {forecast.pace.waits_s / forecast.pace.step_s:.0%} of it waiting for other workers' data"
    return (
        f"{gpu}{host}checkpoint {size(forecast.checkpoint_bytes)}, export {size(forecast.export_bytes)},"
        f" each worker sends {size(forecast.sent_bytes)} a step{step}"
    )


def _cost(forecasts: Sequence[Forecast], cluster: Cluster) -> str:
    steps = sum(each.num_steps for each in forecasts)
    tokens = sum(each.num_steps * each.tokens_per_step for each in forecasts)
    seconds = total_s(forecasts)
    price = ""
    if cluster.price_per_hour is not None and seconds:
        price = (
            f", about {cluster.price_per_hour * seconds / 3600:,.2f} at {cluster.price_per_hour:,.2f} an hour"
        )
    takes = f", about {_time(seconds)} of steps" if seconds else ""
    return f"  in all: {steps:,} steps, up to {tokens:,} tokens{takes}{price}; {size(disk_bytes(forecasts))} on the run root's disk"


def _shares(forecast: Forecast) -> tuple[float, float]:
    device = forecast.device_bytes / forecast.device_room if forecast.device_room else 0.0
    host = forecast.host_bytes / forecast.host_room if forecast.host_room else 0.0
    return device, host


def _of(used: int, room: int | None) -> str:
    return f"{size(used)} of {size(room)}" if room else size(used)


def size(count: int) -> str:
    """Return bytes in words."""
    for unit, name in ((1 << 40, "TiB"), (GIB, "GiB"), (MIB, "MiB")):
        if count >= unit:
            return f"{count / unit:,.1f} {name}"
    return f"{count / 1024:,.1f} KiB"


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:.1f} s"
