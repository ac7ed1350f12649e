"""Which curves a page shows: of one run by stage, of several on top of each other."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from launcher.report import charts, curves
from launcher.report.charts import NUM_COLOURS, Axes, Chart, Series
from launcher.report.curves import Floats, Record
from launcher.report.past import Past

__all__ = ["NUM_COLOURS", "Wanted", "num_lost", "of_run", "of_runs", "wanted"]
_WELL_KNOWN = frozenset(
    "time step loss lr gradient_norm epoch targets samples tokens slots data_s step_s".split()
)
_MOST_OTHERS = 6
_STEEP = 30.0
"""A curve that falls by more than this is drawn by its logarithm."""
GIB = float(1 << 30)


@dataclass(frozen=True, slots=True)
class Wanted:
    """One curve of a stage.

    Attributes:
        title: of its chart.
        x, y: of every step or evaluation that counts.
        aside_x, aside_y: of steps that were trained again.
        dots: whether these are few, each of its own weight.
        is_metric: whether it is of evaluations.
    """

    title: str
    x: Floats
    y: Floats
    aside_x: Floats
    aside_y: Floats
    dots: bool = False
    is_metric: bool = False


def of_run(past: Past, stage: str) -> list[Chart]:
    """Return the charts of one stage of a run."""
    marks = _marks(past.record, stage)
    drawn = []
    found = wanted(past, stage)
    losses = {title: each for title, each in found.items() if _is_loss(title)}
    shares = {t: e for t, e in found.items() if e.is_metric and not _is_loss(t) and e.y.max() <= 1.0}
    for title, group in (("loss", losses), ("metrics", shares)):
        if any(len(each.x) > 1 for each in group.values()):
            name = title if len(group) > 1 else next(iter(group))
            drawn.append(_chart(name, [(each.title, each) for each in group.values()], marks))
    rest = [each for title, each in found.items() if title not in losses and title not in shares]
    drawn += [_chart(each.title, [(each.title, each)], marks) for each in rest if len(each.x) > 1]
    return drawn


def of_runs(pasts: Sequence[tuple[str, Past]], stage: str) -> list[Chart]:
    """Return the charts of one stage of several runs, one curve a run.

    Args:
        pasts: each with the name that it is told by.
        stage: its name, in those of them that have it.
    """
    by_run = [(name, wanted(past, stage)) for name, past in pasts]
    titles = dict.fromkeys(title for _, found in by_run for title in found)
    drawn = []
    for title in titles:
        group = [(name, found.get(title)) for name, found in by_run]
        if any(each is not None and len(each.x) > 1 for _, each in group):
            drawn.append(_chart(title, group, (), is_overlaid=True))
    return drawn


def wanted(past: Past, stage: str) -> dict[str, Wanted]:
    """Return the curves of a stage by title, in the order in which they are shown."""
    record = past.record
    if stage not in record.stages:
        return {}
    here = record.stage == record.stages.index(stage)
    lost = past.ledger.is_lost
    found: dict[str, Wanted] = {}

    def add(title: str, y: Floats) -> None:
        if np.isfinite(y[here]).any():
            x = record.step.astype(np.float64)
            kept, aside = here & ~lost, here & lost
            found[title] = Wanted(title, x[kept], y[kept], x[aside], y[aside])

    add("loss", record.column("loss"))
    for name in sorted(name for name in record.columns if name.startswith("loss of ")):
        add(name, record.column(name))
    found |= _evaluated(record, stage)
    add("learning rate", record.column("lr"))
    with np.errstate(divide="ignore", invalid="ignore"):
        add("tokens a second", record.column("tokens") / record.column("step_s"))
    add("gradient norm", record.column("gradient_norm"))
    others = [n for n in sorted(record.columns) if n not in _WELL_KNOWN and not n.startswith("loss of ")]
    for name in others[:_MOST_OTHERS]:
        if name.endswith("_bytes"):
            add(f"{name.removesuffix('_bytes').replace('_', ' ')}, GiB", record.column(name) / GIB)
        else:
            add(name.replace("_", " "), record.column(name))
    return found | _used(record, stage)


def num_lost(past: Past, stage: str) -> int:
    """Return how many steps of a stage were trained again."""
    if stage not in past.record.stages:
        return 0
    here: NDArray[np.bool_] = past.record.stage == past.record.stages.index(stage)
    return int((here & past.ledger.is_lost).sum())


def _evaluated(record: Record, stage: str) -> dict[str, Wanted]:
    """The metrics of evaluations by step; of a step that was evaluated twice, the last time."""
    by_step = {e["step"]: e["metrics"] for e in record.events if e["kind"] == "eval" and e["stage"] == stage}
    names = dict.fromkeys(name for metrics in by_step.values() for name in metrics)
    nothing = np.zeros(0)
    found = {}
    for name in names:
        title = "loss in evaluation" if name == "loss" else name
        steps = sorted(step for step, metrics in by_step.items() if name in metrics)
        y = np.array([by_step[step][name] for step in steps], np.float64)
        x = np.array(steps, np.float64)
        found[title] = Wanted(title, x, y, nothing, nothing, dots=True, is_metric=True)
    return found


def _used(record: Record, stage: str) -> dict[str, Wanted]:
    """The memory of rank 0 at the peak so far, as it is told now and then."""
    told = [e for e in record.events if e["kind"] == "usage" and e.get("stage") == stage and "memory" in e]
    nothing, found = np.zeros(0), {}
    for place, title in (("device", "GPU memory of rank 0, GiB"), ("host", "host memory of rank 0, GiB")):
        here = [(float(e["step"]), e["memory"][place] / GIB) for e in told if e["memory"].get(place)]
        if here:
            x, y = np.array(here).T
            found[title] = Wanted(title, x, y, nothing, nothing, dots=True)
    return found


def _chart(
    title: str,
    group: Sequence[tuple[str, Wanted | None]],
    marks: Sequence[float],
    *,
    is_overlaid: bool = False,
) -> Chart:
    series: list[Series] = []
    for colour, (name, each) in enumerate(group):
        if each is None:
            continue
        is_dense = len(each.x) > 100
        thin = curves.thinned(each.x, each.y)
        y = curves.smoothed(thin.y, len(thin.y) // 40) if is_dense and not each.dots else thin.y
        has_band = is_dense and not each.dots and not is_overlaid
        low, high = (thin.low, thin.high) if has_band else (None, None)
        if has_band and len(each.x) == len(thin.x):
            low, high = _range(thin.y, len(thin.y) // 40)
        dots = each.dots and len(thin.x) <= 60
        series.append(Series(name, thin.x, y, low, high, colour=colour, dots=dots))
        if len(each.aside_x) and _is_loss(each.title) and not is_overlaid:
            aside = curves.thinned(each.aside_x, each.aside_y)
            x, y = _broken(aside.x, aside.y)
            series.append(Series(f"{name}, trained again later", x, y, colour=colour + 4, is_aside=True))
    # Metrics are shares of 1 mostly; what they differ by beyond the third place is of no interest.
    is_share = all(each.is_metric for _, each in group if each is not None)
    axes = Axes(is_log=_is_steep(title, series), least_range=0.02 if is_share else 0.0, marks=marks[:50])
    return charts.lines(title, series, axes)


def _range(y: Floats, width: int) -> tuple[Floats, Floats]:
    """The least and most of the values around each, where buckets hold one each."""
    if width < 2:
        return y, y
    around = np.lib.stride_tricks.sliding_window_view(np.pad(y, width // 2, mode="edge"), width // 2 * 2 + 1)
    return around.min(axis=1), around.max(axis=1)


def _broken(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Put a gap wherever the steps go back, or far ahead: the work of several tries is not one line."""
    between = np.diff(x)
    is_apart = (between <= 0) | (between > 3 * np.median(between)) if len(between) else np.zeros(0, np.bool_)
    places = np.flatnonzero(is_apart) + 1
    return np.insert(x, places, np.nan), np.insert(y, places, np.nan)


def _marks(record: Record, stage: str) -> list[float]:
    begins = [e for e in record.events if e["kind"] == "stage_begin" and e["stage"] == stage]
    return [float(event["start"]) for event in begins[1:]]


def _is_loss(title: str) -> bool:
    return title == "loss" or title.startswith("loss ")


def _is_steep(title: str, series: Sequence[Series]) -> bool:
    values = np.concatenate([each.y[np.isfinite(each.y)] for each in series]) if series else np.zeros(0)
    if not (_is_loss(title) or title == "gradient norm") or not len(values) or values.min() <= 0:
        return False
    return bool(values.max() / values.min() > _STEEP)
