"""Charts as SVG that stands in a page: colours come from the page's style sheet, values under the cursor from its script."""

import io
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Before its import: it would say into the run's output that it looks for fonts, or has no home for their list.
logging.getLogger("matplotlib").setLevel(logging.ERROR)

import matplotlib  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter  # noqa: E402

from launcher.report import words  # noqa: E402
from launcher.report.ledger import LINES, Span  # noqa: E402

Floats = NDArray[np.float64]
WIDTH, HEIGHT = 4.6, 2.5
"""Inches, at 72 points each: about a telephone's width, so that letters keep their size there."""
NUM_COLOURS = 8
_INK, _GRID = "#0a0b01", "#0a0b02"
_SERIES = [f"#0c0d{i:02x}" for i in range(NUM_COLOURS)]
_KINDS = {kind: f"#0e0f{i:02x}" for i, kind in enumerate(LINES)}
_VARIABLES = {
    _INK: "var(--ink-2)",
    _GRID: "var(--line)",
    **{colour: f"var(--series-{i})" for i, colour in enumerate(_SERIES)},
    **{colour: f"var(--kind-{kind})" for kind, colour in _KINDS.items()},
}
"""Colours that nobody would choose stand for the page's own, which differ by day and by night."""
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "launcher",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.formatter.limits": (-4, 5),
    "axes.formatter.useoffset": False,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "text.color": _INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.solid_joinstyle": "round",
}


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart.

    Attributes:
        name: in the legend, and under the cursor.
        x, y: its points.
        low, high: what each point stands for ranged over, drawn as a band; None: nothing.
        colour: its number.
        dots: whether each point is marked, and not only joined to the next.
        is_aside: drawn thin and dashed: what did not count in the end.
    """

    name: str
    x: Floats
    y: Floats
    low: Floats | None = None
    high: Floats | None = None
    colour: int = 0
    dots: bool = False
    is_aside: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One chart, drawn.

    Attributes:
        title: above it.
        svg: the drawing.
        points: JSON for the page's script: where the axes are, and every series' values.
        legend: the name and the colour's number of each series, where there are several.
    """

    title: str
    svg: str
    points: str
    legend: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Axes:
    """How a chart's axes are.

    Attributes:
        x_name: under them.
        is_log: whether values stand by their logarithm.
        least_range: that values span at least, so that rounding does not look like a change.
        marks: places at which something broke, as upright lines.
    """

    x_name: str = "step"
    is_log: bool = False
    least_range: float = 0.0
    marks: Sequence[float] = field(default_factory=tuple)


def lines(title: str, series: Sequence[Series], axes: Axes | None = None) -> Chart:
    """Draw curves."""
    axes = axes or Axes()
    with _style():
        figure, plot = _figure(HEIGHT)
        for each in series:
            colour = _SERIES[each.colour % NUM_COLOURS]
            if each.low is not None and each.high is not None:
                plot.fill_between(each.x, each.low, each.high, color=colour, alpha=0.18, linewidth=0)
            dash, width = ("--", 1.4) if each.is_aside else ("-", 1.6)
            marker = "o" if each.dots or len(each.x) == 1 else None
            plot.plot(each.x, each.y, ls=dash, lw=width, marker=marker, ms=3.5, color=colour)
        for place in axes.marks:
            plot.axvline(place, color=_KINDS["restart"], linewidth=1.0, linestyle=":")
        if axes.is_log:
            plot.set_yscale("log")
            plot.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
            plot.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            plot.yaxis.set_minor_formatter(NullFormatter())
        else:
            low, high = plot.get_ylim()
            missing = max(0.0, axes.least_range - (high - low), 0.02 * max(-low, high) - (high - low)) / 2
            plot.set_ylim(low - missing, high + missing)
        plot.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
        plot.xaxis.set_major_formatter(FuncFormatter(lambda value, _: words.count(value)))
        plot.set_xlabel(axes.x_name)
        plot.margins(x=0.01)
        svg = _svg(figure, title)
        points = _points(figure, plot, series)
    legend = tuple((each.name, each.colour % NUM_COLOURS) for each in series) if len(series) > 1 else ()
    return Chart(title=title, svg=svg, points=points, legend=legend)


def stretches(tries: Sequence[tuple[str, Sequence[Span]]]) -> str:
    """Draw what tries spent their time on, one row each, over the minutes since each began.

    Args:
        tries: the name of each, and its spans.
    """
    with _style():
        figure, plot = _figure(0.75 + 0.32 * len(tries))
        longest = max((spans[-1].end_s - spans[0].begin_s for _, spans in tries if spans), default=1.0)
        unit, name = _time_unit(longest)
        for row, (_, spans) in enumerate(tries):
            for kind in dict.fromkeys(each.kind for each in spans):
                bars = [
                    ((each.begin_s - spans[0].begin_s) / unit, (each.end_s - each.begin_s) / unit)
                    for each in spans
                    if each.kind == kind
                ]
                plot.broken_barh(bars, (row - 0.36, 0.72), facecolors=_KINDS[kind], linewidth=0)
        plot.set_yticks(range(len(tries)), [name for name, _ in tries])
        plot.set_ylim(len(tries) - 0.4, -0.6)
        plot.grid(axis="y", visible=False)
        plot.set_xlabel(f"{name} since each began")
        plot.margins(x=0.0)
        return _svg(figure, "what the time went into, from left to right")


def _style() -> Any:
    # The user's matplotlibrc is not asked: whatever it says, the page stays readable.
    return matplotlib.rc_context(dict(matplotlib.rcParamsDefault) | _STYLE | {"backend": "svg"})


def _figure(height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.patch.set_alpha(0)
    plot = figure.add_subplot()
    plot.patch.set_alpha(0)
    return figure, plot


def _svg(figure: Figure, title: str) -> str:
    """Return the drawing without what only a file of its own needs."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(file, format="svg", metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.S)
    # Several drawings in one page: their groups' names would meet. Only what is referred to keeps its own.
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r'(?:height|width)="[^"]*pt" ?', "", text, count=2)
    text = re.sub(r"; font-family: [^;\"]*|font-family: [^;\"]*;? ?", "", text)
    label = title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    text = text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return text


def _points(figure: Figure, plot: Any, series: Sequence[Series]) -> str:
    """Return the values for the page's script, with the axes' place in the drawing as parts of its width."""
    box = plot.get_position()
    low, high = plot.get_xlim()
    return json.dumps(
        {
            "box": [round(v, 4) for v in (box.x0, box.x1)],
            "x": [_short(low), _short(high)],
            "series": [
                {
                    "name": each.name,
                    "colour": each.colour % NUM_COLOURS,
                    "x": [_short(v) for v in each.x.tolist()],
                    "y": [_short(v) for v in each.y.tolist()],
                }
                for each in series
            ],
        },
        separators=(",", ":"),
    ).replace("<", "\\u003c")


def _short(value: float) -> float | None:
    return float(f"{value:.5g}") if np.isfinite(value) and abs(value) < 1e5 else _whole(value)


def _whole(value: float) -> float | None:
    return round(value, 1) if np.isfinite(value) else None


def _time_unit(seconds: float) -> tuple[float, str]:
    if seconds > 3 * 3600:
        return 3600.0, "hours"
    return (60.0, "minutes") if seconds > 180 else (1.0, "seconds")
