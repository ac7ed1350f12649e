"""Plots of what `scaling.py` found, as PNG."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = ("#1b6ca8", "#e07b39", "#3f8f4f", "#8a4fa3", "#7a7a7a")
LABEL = "computed, not measured"


def write(found: dict[str, Any], out: Path) -> None:
    """Write the plots that the results allow, beside them.

    Args:
        found: by part.
        out: the file of results; plots are called after it.
    """
    plt.rcParams.update({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "figure.dpi": 100})
    base = out.with_suffix("")
    if "workers" in found:
        _workers(found["workers"], Path(f"{base}-workers.png"))
    rows = [row for part in ("links", "far", "pairs") if part in found for row in found[part]["rows"]]
    if rows:
        _checked(rows, Path(f"{base}-checked.png"))
    if "drawn" in found:
        _drawn(found["drawn"], Path(f"{base}-drawn.png"))


def _workers(rows: list[dict[str, Any]], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for number, job in enumerate(dict.fromkeys(row["job"] for row in rows)):
        mine = [row for row in rows if row["job"] == job]
        ranks = [row["ranks"] for row in mine]
        axes[0].plot(ranks, [row["tokens_per_s"] for row in mine], "o-", color=COLOURS[number], label=job)
        axes[1].plot(ranks, [row["in_collectives"] for row in mine], "o-", color=COLOURS[number], label=job)
    cores = rows[0]["cores"]
    for each, title in zip(axes, ("useful tokens/s", "share of a step in collectives"), strict=True):
        each.set_title(title)
        each.set_xlabel("workers")
        each.set_ylim(bottom=0)
        each.xaxis.get_major_locator().set_params(integer=True)
        each.axvspan(cores + 0.5, max(row["ranks"] for row in rows) + 0.3, color="#bbbbbb", alpha=0.3)
    axes[0].legend()
    figure.suptitle(f"measured on {cores} cores; shaded: more workers than cores")
    figure.savefig(path)
    plt.close(figure)


def _checked(rows: list[dict[str, Any]], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(5.2, 4.4), layout="constrained")
    for number, job in enumerate(dict.fromkeys(row["job"] for row in rows)):
        mine = [row for row in rows if row["job"] == job]
        for is_far, marker in ((False, "o"), (True, "^")):
            shown = [row for row in mine if (row["delay_ms"] > 0) == is_far]
            axis.plot(
                [row["measured_s"] for row in shown],
                [row["predicted_s"] for row in shown],
                marker,
                color=COLOURS[number % len(COLOURS)],
                label=None if is_far else job,
            )
    ends = [min(row["measured_s"] for row in rows) * 0.8, max(row["measured_s"] for row in rows) * 1.2]
    axis.plot(ends, ends, "-", color="black", linewidth=0.8)
    axis.fill_between(ends, [0.85 * each for each in ends], [1.15 * each for each in ends], alpha=0.12)
    axis.set(xscale="log", yscale="log", xlabel="measured seconds of a step", ylabel="predicted")
    axis.set_title("two hosts, a throttled link\ntriangles: with delay; band: 15 %")
    axis.legend()
    figure.savefig(path)
    plt.close(figure)


def _drawn(points: list[dict[str, Any]], path: Path) -> None:
    models = list(dict.fromkeys(point["model"] for point in points))
    networks = list(dict.fromkeys(point["network"] for point in points))
    figure, axes = plt.subplots(
        len(networks), len(models), figsize=(4.4 * len(models), 6), layout="constrained", squeeze=False
    )
    ways = list(dict.fromkeys(point["way"] for point in points))
    for row, network in enumerate(networks):
        for column, model in enumerate(models):
            axis = axes[row][column]
            for number, way in enumerate(ways):
                _line(
                    axis,
                    [p for p in points if (p["network"], p["model"], p["way"]) == (network, model, way)],
                    number,
                )
            axis.set(xscale="log", xlabel="GPUs (8 a node)", ylabel="efficiency", ylim=(0, 1.05))
            axis.set_xticks([8, 16, 32, 64, 128, 256, 512, 1024], [8, 16, 32, 64, 128, 256, 512, 1024])
            axis.minorticks_off()
            axis.set_title(f"{model}, {network} a node")
    handles = [plt.Line2D([], [], color=COLOURS[i], label=way) for i, way in enumerate(ways)]
    axes[0][0].legend(handles=handles, fontsize=7, loc="lower left")
    figure.suptitle(
        f"{LABEL}: H100, packs of 4k tokens\nsolid: weak (a pack a GPU); dashed: strong (4 M tokens a step)"
    )
    figure.savefig(path)
    plt.close(figure)


def _line(axis: Any, points: list[dict[str, Any]], number: int) -> None:
    for kind, style in (("weak", "-"), ("strong", "--")):
        mine = [point for point in points if point["kind"] == kind and point["fits"]]
        axis.plot(
            [point["gpus"] for point in mine],
            [point["efficiency"] for point in mine],
            style,
            color=COLOURS[number],
            marker=".",
        )
