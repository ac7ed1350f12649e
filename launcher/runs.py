"""The runs of a run root: `launcher runs` lists them, `launcher runs clean` frees space."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher import cleaning, listing, storage
from launcher.errors import LauncherError, tell
from launcher.listing import Run
from launcher.report import cost, lines, words
from launcher.report.forecast import size
from launcher.report.progress import Progress
from launcher.report.tail import Tail

DAY_S = 86400.0
_HEAD = ("RUN", "STATE", "AT", "METRIC", "BEGUN", "TOOK", "COST", "CHECKPOINTS", "EXPORTS", "REST")
_NOT_DONE, _INTERRUPTED = 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """List the runs, or free space; return the process's exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words[:1] == ["clean"]:
            return _clean(clean_parser().parse_args(words[1:]))
        return _list(parser().parse_args(words))
    except (LauncherError, OSError) as error:
        return tell(error)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return _INTERRUPTED


def parser() -> argparse.ArgumentParser:
    """Return the parser of the list."""
    found = argparse.ArgumentParser(
        prog="launcher runs",
        description="List the runs of a run root; `launcher runs clean` frees space (see its --help).",
    )
    found.add_argument("--run-root", metavar="DIR", help="where runs are kept; default: as for a run")
    found.add_argument("--json", action="store_true", help="print JSON, with times in seconds and bytes")
    return found


def clean_parser() -> argparse.ArgumentParser:
    """Return the parser of `clean`."""
    found = argparse.ArgumentParser(
        prog="launcher runs clean",
        description="Free space: checkpoints of finished runs, old directories that --fresh moved aside, leftovers"
        " of interrupted writes, token stores that no unfinished run needs. It says what, and asks.",
    )
    found.add_argument("run", nargs="*", help="only of these runs; default: of all, and the token stores")
    found.add_argument("--run-root", metavar="DIR", help="where runs are kept; default: as for a run")
    found.add_argument(
        "--older-than", type=float, default=0.0, metavar="DAYS", help="only what was not written to since"
    )
    found.add_argument(
        "--keep-exports", action="store_true", help="of old directories free the checkpoints only"
    )
    found.add_argument("--yes", action="store_true", help="do not ask")
    return found


def as_json(run: Run) -> dict[str, Any]:
    """Return what a list says of a run, as JSON values: times in seconds, sizes in bytes."""
    progress, sizes = _progress(run), cleaning.sizes(run.path)
    plan = storage.read_json(run.path / "plan.json") or {}
    paid = cost.paid(plan, run.report)
    return {
        "name": run.name,
        "path": str(run.path),
        "state": run.state,
        "verdict": run.kind,
        "stage": progress.stage,
        "step": progress.step,
        "num_steps": progress.num_steps,
        "metric": _metric(progress),
        "begun": run.report.get("begun"),
        "seen": run.seen_s,
        "seconds": round(cost.all_tries_s(run.report), 1),
        "cost": None if paid is None else round(paid, 2),
        "bytes": {"checkpoints": sizes.checkpoints, "exports": sizes.exports, "rest": sizes.rest},
    }


def _list(options: argparse.Namespace) -> int:
    roots = listing.roots(options.run_root)
    found = [(root, [_read(run) for run in listing.all_in(root)]) for root in roots]
    if options.json:
        print(json.dumps([run for _, runs in found for run in runs], indent=1))
        return 0
    for root, runs in found:
        print(f"{root}:" + ("" if runs else " no runs"))
        if read := [run for run in runs if "error" not in run]:
            print("\n".join(_table([_HEAD, *(_row(run) for run in read)])))
        for run in runs:
            if "error" in run:
                print(f"{run['name']}: cannot be read: {run['error']}")
    if not found:
        print("no runs here: --run-root names where they are kept")
    return 0


def _read(run: Run) -> dict[str, Any]:
    """Return what a list says of a run; of one that cannot be read, why: its files may be of any version, or broken."""
    odd = {"name": run.name, "path": str(run.path), "state": "unreadable"}
    if run.state == "unreadable":
        return odd | {"error": run.kind}
    try:
        return as_json(run)
    except Exception as error:
        return odd | {"error": f"{type(error).__name__}: {error}"}


def _clean(options: argparse.Namespace) -> int:
    roots = listing.roots(options.run_root)
    named: dict[Path, set[str]] = {}
    for run in [listing.find(name, roots) for name in options.run]:
        named.setdefault(listing.root_of(run.path, roots), set()).add(run.name)
    result = 0
    for root in named or roots:
        items, kept = cleaning.plan(
            root,
            listing.all_in(root),
            named=named.get(root, ()),
            older_than_s=options.older_than * DAY_S,
            keep_exports=options.keep_exports,
        )
        result = max(result, _free(items, kept, root, is_agreed=options.yes))
    return result


def _free(items: list[cleaning.Item], kept: list[str], root: Path, *, is_agreed: bool) -> int:
    """Say what would be freed, ask, and free it; return the exit code."""
    total = sum(item.bytes for item in items)
    print(f"{root}: {size(total)} can be freed" if items else f"{root}: nothing to free")
    if items:
        rows = [(size(item.bytes), item.owner, item.what) for item in items]
        print("\n".join(f"  {line}" for line in _table(rows, right=(0,))))
    for reason in kept:
        print(f"  kept: {reason}")
    if not items:
        return 0
    if not is_agreed:
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            print("nothing was deleted: --yes deletes it")
            return 0
        if not _agrees(f"delete these, {size(total)}? [y/N] "):
            print("nothing was deleted")
            return 0
    freed = [item for item in items if cleaning.free(item, root)]
    print(f"freed {size(sum(item.bytes for item in freed))}")
    left = [item for item in items if item not in freed]
    for item in left:
        print(f"  not freed: {item.owner}: {item.what}: it is in use by now, or may not be deleted")
    return _NOT_DONE if left else 0


def _agrees(question: str) -> bool:
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        print()
        return False
    except KeyboardInterrupt:
        print("\nnothing was deleted")
        raise


def _progress(run: Run) -> Progress:
    progress = Progress()
    for event in listing.events(run, Tail(run.path / listing.RECORD)):
        progress.take(event)
    return progress


def _metric(progress: Progress) -> dict[str, float]:
    """The last metric: of the last stage that was evaluated, the first of its metrics; else the loss in training."""
    evaluated = [stage for stage in progress.stages.values() if stage.metrics and stage.name != "baseline"]
    if evaluated:
        name, value = next(iter(evaluated[-1].metrics.items()))
        return {f"{evaluated[-1].name} {name}" if len(progress.stages) > 1 else name: value}
    return {"train loss": progress.last["loss"]} if progress.last else {}


def _row(run: dict[str, Any]) -> tuple[str, ...]:
    state = run["state"] + (f" ({run['verdict']})" if run["state"] == "failed" else "")
    at = f"{run['stage']} {run['step']:,}/{run['num_steps']:,}" if run["stage"] else ""
    begun = time.strftime("%Y-%m-%d %H:%M", time.localtime(run["begun"])) if run["begun"] else ""
    return (
        run["name"],
        state,
        at,
        words.metrics(run["metric"]),
        begun,
        lines.duration(run["seconds"]),
        "" if run["cost"] is None else f"{run['cost']:,.2f}",
        *(size(run["bytes"][kind]) for kind in ("checkpoints", "exports", "rest")),
    )


def _table(rows: Sequence[Sequence[str]], right: Sequence[int] = (5, 6, 7, 8, 9)) -> list[str]:
    """Return rows as lines with their columns in line; columns that are empty throughout are left out."""
    columns = range(len(rows[0]))
    has_head = rows[0][0] == _HEAD[0]
    shown = [i for i in columns if any(row[i] for row in rows[1 if has_head else 0 :])]
    width = {i: max(len(row[i]) for row in rows) for i in shown}
    return [
        "  ".join(row[i].rjust(width[i]) if i in right else row[i].ljust(width[i]) for i in shown).rstrip()
        for row in rows
    ]
