"""What a run directory tells of the run: all of its files together, as far as they are there."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import storage
from launcher.errors import BadInput
from launcher.report import alive, curves, ledger, opened
from launcher.report.curves import Record
from launcher.report.ledger import Ledger, Try

Tree = dict[str, Any]
RUNNING, LOST = "running", "driver lost"


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """A run as its directory has it. A file that is missing is an empty tree.

    Attributes:
        run_dir: the run's.
        report, summary, plan, ds: report.json, summary.json, plan.json, ds.json.
        recipe: the tree in recipe.yaml.
        recipe_text: its text.
        record: metrics.jsonl in columns.
        tries, ledger: of the whole run.
        stages: by name, what its done.json says, with `after` and `examples` where they are.
    """

    run_dir: Path
    report: Tree
    summary: Tree
    plan: Tree
    ds: Tree
    recipe: Tree
    recipe_text: str
    record: Record
    tries: list[Try]
    ledger: Ledger
    stages: dict[str, Tree]

    @property
    def name(self) -> str:
        return self.run_dir.absolute().name

    @property
    def verdict(self) -> Tree:
        """How the run ended; of one whose driver is gone, that."""
        if not self.report.get("verdict"):
            return {"kind": "unknown"}
        found: Tree = self.report["verdict"]
        if found.get("kind") != RUNNING:
            return found
        if not alive.is_alive(found, self.report, alive.seen_s(self.run_dir)):
            return {**found, "kind": LOST}
        return found

    @property
    def is_done(self) -> bool:
        return self.verdict["kind"] == "done" or (bool(self.summary) and "verdict" not in self.report)

    def asked(self, stage: str) -> Tree:
        """Return what the recipe says of a stage; of the baseline, what it says of the last one."""
        asked = self.recipe.get("stages") or []
        named: list[Tree] = [each for each in asked if each.get("name") == stage]
        return (named or asked[-1:] or [{}])[0]

    def metrics(self, stage: str) -> dict[str, float]:
        """Return a stage's last metrics: of its end, or of the last evaluation so far."""
        if found := self.stages.get(stage, {}).get("metrics"):
            return dict(found)
        evals = [e for e in self.record.events if e["kind"] == "eval" and e.get("stage") == stage]
        return dict(evals[-1]["metrics"]) if evals else {}


def read(run_dir: Path) -> Past:
    """Read all that a run directory tells.

    Raises:
        BadInput: it is no run's.
    """
    if not any((run_dir / name).is_file() for name in ("recipe.yaml", "metrics.jsonl", "report.json")):
        raise BadInput(
            f"{run_dir}: no recipe.yaml, metrics.jsonl or report.json there: give the directory of a run"
        )
    report = _tree(run_dir / "report.json")
    record = curves.read(run_dir / "metrics.jsonl")
    text, recipe = opened.recipe(run_dir)
    tries = _tries(report, record)
    stages = _stages(run_dir, recipe, record)
    done = [name for name, stage in stages.items() if "steps" in stage]
    return Past(
        run_dir=run_dir,
        report=report,
        summary=_tree(run_dir / "summary.json"),
        plan=_tree(run_dir / "plan.json"),
        ds=_tree(run_dir / "ds.json"),
        recipe=recipe,
        recipe_text=text,
        record=record,
        tries=tries,
        ledger=ledger.ledger(record, tries, done),
        stages=stages,
    )


def _tree(path: Path) -> Tree:
    found = storage.read_json(path)
    return found if isinstance(found, dict) else {}


def _stages(run_dir: Path, recipe: Tree, record: Record) -> dict[str, Tree]:
    """By name, in the order of the recipe, the baseline last, what is known of the end of each."""
    names = [each["name"] for each in recipe.get("stages") or [] if "name" in each]
    begun = [event["stage"] for event in record.events if event["kind"] == "stage_begin"]
    found: dict[str, Tree] = {}
    for name in dict.fromkeys([*names, *record.stages, *begun]):
        folder = run_dir / "stages" / name
        found[name] = dict(_tree(folder / "done.json"))
        if after := _tree(folder / "after.json"):
            found[name]["after"] = after.get("metrics", {})
        if examples := _tree(folder / "examples.json"):
            found[name]["examples"] = examples
    return found


def _tries(report: Tree, record: Record) -> list[Try]:
    """All tries; where no report tells of them, one that lasted as long as the record."""
    first = min((e["time"] for e in record.events[:1]), default=None)
    times = record.time[[0, -1]].tolist() if len(record.step) else []
    seen = [*times, *([first] if first is not None else []), *(e["time"] for e in record.events[-1:])]
    if not report:
        return [Try(begun_s=min(seen), ended_s=max(seen), kind="unknown")] if seen else []
    tries = [_try(each, each.get("kind", ""), seen) for each in report.get("earlier") or []]
    return [*tries, _try(report, (report.get("verdict") or {}).get("kind", ""), seen)]


def _try(told: Tree, kind: str, seen: list[float]) -> Try:
    startup = told.get("startup") or {}
    begun_s = startup.get("begun", told.get("begun")) or (min(seen) if seen else 0.0)
    ended_s = told.get("ended") or max([begun_s, *seen])
    events = told.get("events") or []
    workers = [event["num_workers"] for event in events if event.get("kind") == "start"]
    return Try(
        begun_s=begun_s,
        ended_s=ended_s,
        kind=kind,
        startup=startup.get("seconds", {}),
        events=events,
        num_workers=(workers or [1])[0],
    )
