"""More workers, and slower links: measured here, predicted by the plan, and drawn for clusters that are not here.

    python benchmarks/scaling.py [--only workers links far pairs launcher drawn] [--quick] [--again]
        [--out benchmarks/results/scaling.json]

- workers: 1 to 4 ranks on this machine, as much work for each (weak) or in all (strong).
- links, far, pairs: ranks on two hosts (network namespaces) with a throttled link between them, against the plan.
- launcher: the launcher itself over such a link.
- drawn: the plan's figures for 8 to 1,024 GPUs. Computed, not measured.

Needs root and iproute2, except for workers and drawn. Results are added to those in the file, and plots (PNG) are made
beside it.
"""

import argparse
import json
import os
import pickle
import statistics
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from benchmarks.scaled import drawn, group, links, plots, work
from benchmarks.scaled.links import Known, Lab, Point, compared, middle
from launcher.plan import traffic

ROWS = 4
STRONG_ROWS = 12
MBIT = 1e6
POINTS = {
    "links": [Point(None, 0, 6), Point(1000 * MBIT, 0, 6), Point(300 * MBIT, 0, 5), Point(100 * MBIT, 0, 3)],
    "far": [
        Point(300 * MBIT, 0, 5),
        Point(300 * MBIT, 0.002, 5),
        Point(300 * MBIT, 0.01, 4),
        Point(100 * MBIT, 0.01, 3),
    ],
    "pairs": [Point(100 * MBIT, 0, 3)],
}
WHOLE = ("zero2", "zero3")
"""Jobs that are measured at all points; the others at the third of them."""
JOBS = {
    "zero2": ("zero2", {}),
    "zero3": ("zero3", {}),
    "zero3-regathered": ("zero3", {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}),
    "zero2-by-owner": ("zero2", {"use_multi_rank_bucket_allreduce": False}),
}


def main() -> None:
    """Measure what is asked for, print and keep it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--quick", action="store_true", help="about a minute: 2 workers, two links, the 8B model"
    )
    parser.add_argument(
        "--again", action="store_true", help="measure nothing: predict again what the file has"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.only = [each for each in options.only if each in ("workers", "links", "drawn")]
    found = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    with tempfile.TemporaryDirectory() as temp:
        work.make_data(Path(temp))
        for part in options.only:
            if not options.again or part == "drawn":
                found[part] = PARTS[part](Path(temp), options.quick, found)
            elif part in LABS and part in found:
                found[part] = predicted_again(Path(temp), part, found)
            if options.out:
                options.out.write_text(_as_text(found))
    if options.out:
        plots.write(found, options.out)


def _as_text(found: dict[str, Any]) -> str:
    """JSON with a line for each row."""
    parts = []
    for name, part in sorted(found.items()):
        rows = part["rows"] if isinstance(part, dict) and "rows" in part else part
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows) if isinstance(rows, list) else ""
        text = f"[\n{lines}\n ]" if isinstance(rows, list) else json.dumps(part)
        if rows is not part:
            rest = {key: value for key, value in part.items() if key != "rows"}
            text = f'{json.dumps(rest)[:-1]}, "rows": {text}}}'
        parts.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def of_workers(folder: Path, quick: bool, _: Any) -> list[dict[str, Any]]:
    """Return of 1 to 4 ranks on this machine: useful tokens/s, efficiency, share of the step in collectives."""
    rows: list[dict[str, Any]] = []
    for ranks in (1, 2) if quick else (1, 2, 3, 4):
        jobs = {}
        for ds in ("zero2",) if quick else ("zero2", "zero3"):
            jobs[f"{ds} weak"] = work.job(folder, f"{ds} weak", ds, rows=ROWS, global_rows=ROWS * ranks)
            part = STRONG_ROWS // ranks
            jobs[f"{ds} strong"] = work.job(folder, f"{ds} strong", ds, rows=part, global_rows=STRONG_ROWS)
        path = folder / f"jobs-{ranks}"
        path.write_bytes(pickle.dumps(jobs))
        with group.ranks(path, folder / "ranks.log", "127.0.0.1", links.PORT, "lo", [[]] * ranks) as them:
            for name in jobs:
                them.tell("build", name=name)
                rows.append(_of_workers(name, ranks, them.tell("steps", number=4 if quick else 8), rows))
    return rows


def _of_workers(
    name: str, ranks: int, told: list[dict[str, Any]], before: list[dict[str, Any]]
) -> dict[str, Any]:
    step_s, waited_s = middle(told, "seconds"), statistics.median(told[0]["waited"])
    rate = statistics.mean(told[0]["tokens"]) / step_s
    one = next((row["tokens_per_s"] for row in before if row["job"] == name and row["ranks"] == 1), rate)
    row = {
        "job": name,
        "ranks": ranks,
        "cores": os.cpu_count(),
        "step_s": round(step_s, 4),
        "tokens_per_s": round(rate, 1),
        "efficiency": round(rate / one / ranks, 3),
        "of_cores": round(rate / one / min(ranks, os.cpu_count() or 1), 3),
        "in_collectives": round(waited_s / step_s, 3),
    }
    print(f"  {row}", flush=True)
    return row


def _jobs(folder: Path, names: list[str], ranks: int) -> dict[str, work.Job]:
    return {
        name: work.job(folder, name, JOBS[name][0], rows=ROWS, global_rows=ROWS * ranks, zero=JOBS[name][1])
        for name in names
    }


def _over(lab: Lab, points: list[Point], known: Known | None) -> dict[str, Any]:
    """Measure all jobs of a lab at all points, and compare.

    Args:
        lab: the hosts.
        points: the first without a limit, where nothing is known yet.
        known: of this machine; None: it is found at the first point, and those rows are not counted.
    """
    measured: list[tuple[str, Point, dict[str, Any]]] = []
    with lab.ranks() as ranks:
        for name in lab.jobs:
            ranks.tell("build", name=name)
            for point in points if name in WHOLE else points[2:3]:
                measured.append((name, point, lab.measure(ranks, point)))
                print(f"  {name} {point} {measured[-1][2]}", flush=True)
    return judged(lab, measured, known)


def judged(
    lab: Lab, measured: list[tuple[str, Point, dict[str, Any]]], known: Known | None
) -> dict[str, Any]:
    """Compare what was measured with the plan."""
    is_fitted = known is None
    known = known or fitted(lab, measured)
    rows = []
    for name, point, found in measured:
        row = compared(lab, name, point, found, known)
        rows.append(row | {"fitted": is_fitted and point.bits_per_s is None})
        print(f"  {rows[-1]}", flush=True)
    return asdict(known) | {"rows": rows} | _ratios(rows)


def fitted(lab: Lab, measured: list[tuple[str, Point, dict[str, Any]]]) -> Known:
    """Return the rate with which ZeRO-2 without a limit comes out as measured, and the cost of a call for ZeRO-3."""
    (first, point, two), three = measured[0], next(row for name, _, row in measured if name == "zero3")
    known = Known(gloo_bytes_s=two["sent"] / max(1e-3, two["step_s"] - two["compute_s"]))
    if first != "zero2" or point.bits_per_s is not None:
        raise SystemExit("the first thing to measure is ZeRO-2 without a limit")
    missing_s = three["step_s"] - lab.predicted(lab.jobs["zero3"], point, known, three["compute_s"])[0].step_s
    stage, shapes, settings = lab.jobs["zero3"].shapes(2)
    calls = sum(each.calls for each in traffic.of_step(shapes, settings, stage) if not each.is_ahead)
    return replace(known, call_s=max(0.0, missing_s / calls))


def predicted_again(folder: Path, part: str, found: dict[str, Any]) -> dict[str, Any]:
    """Return a part's rows with the plan's prediction as it is now."""
    per_host, is_far = LABS[part]
    old = found[part]["rows"]
    names = list(dict.fromkeys(row["job"] for row in old))
    lab = Lab(folder, _jobs(folder, names, 2 * per_host), per_host, is_far=is_far)
    measured = [
        (
            row["job"],
            Point(row["mbit_per_s"] and row["mbit_per_s"] * MBIT, row["delay_ms"] / 1e3, 0),
            {"step_s": row["measured_s"], "compute_s": row["compute_s"], "sent": row["sent"]},
        )
        for row in old
    ]
    return judged(lab, measured, None if part == "links" else _known(found))


def _ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    ratios = [row["ratio"] for row in rows if not row["fitted"]]
    errors = [abs(each - 1) for each in ratios]
    found = {"median_ratio": statistics.median(ratios), "median_error": round(statistics.median(errors), 3)}
    print(f"  predicted / measured {found}, {min(ratios)} to {max(ratios)}", flush=True)
    return found


def _known(found: dict[str, Any]) -> Known:
    if "links" not in found:
        raise SystemExit(
            "far, pairs and launcher need what links finds first: what gloo does without a limit"
        )
    return Known(gloo_bytes_s=found["links"]["gloo_bytes_s"], call_s=found["links"]["call_s"])


def of_links(folder: Path, quick: bool, _: Any) -> dict[str, Any]:
    """Two hosts with a rank each, at several bandwidths."""
    names, points = (
        (["zero2", "zero3"], [POINTS["links"][0], POINTS["links"][2]])
        if quick
        else (list(JOBS), POINTS["links"])
    )
    return _over(Lab(folder, _jobs(folder, names, 2)), points, None)


def of_far(folder: Path, quick: bool, found: dict[str, Any]) -> dict[str, Any]:
    """The same over a link that takes its time."""
    names = ["zero2", "zero3", "zero3-regathered"][: 3 if not quick else 2]
    return _over(Lab(folder, _jobs(folder, names, 2), is_far=True), POINTS["far"], _known(found))


def of_pairs(folder: Path, _: bool, found: dict[str, Any]) -> dict[str, Any]:
    """Two hosts with two ranks each: more ranks than cores, so that only the slow link can be told."""
    lab = Lab(folder, _jobs(folder, ["zero2", "zero3"], 4), per_host=2)
    return _over(lab, POINTS["pairs"], _known(found))


def of_launcher(folder: Path, _: bool, found: dict[str, Any]) -> dict[str, Any]:
    """The launcher itself, on a Ray cluster of two hosts, against the same prediction."""
    from benchmarks.scaled import launched

    return launched.compare(folder, _jobs(folder, ["zero2"], 2), Point(100 * MBIT, 0, 0), _known(found))


def of_drawn(_: Path, quick: bool, __: Any) -> list[dict[str, Any]]:
    """The plan's figures for clusters of GPUs."""
    return drawn.all_points(["8B"] if quick else list(drawn.MODELS))


LABS = {"links": (1, False), "far": (1, True), "pairs": (2, False)}
"""Parts on two hosts: ranks on each, and whether the link takes its time."""
PARTS = {
    "workers": of_workers,
    "links": of_links,
    "far": of_far,
    "pairs": of_pairs,
    "launcher": of_launcher,
    "drawn": of_drawn,
}

if __name__ == "__main__":
    main()
