"""The sections of a run's page as plain figures and words; one that has nothing to tell is None. Pure."""

import json
import shlex

import yaml
from pydantic import ValidationError

from launcher import recipe as recipes
from launcher.report import cost, opened, words
from launcher.report.ledger import LINES
from launcher.report.measured import StageFigures, figures
from launcher.report.past import LOST, RUNNING, Past, Tree

_CALM = (RUNNING, "unknown", "stopped by the user", "preempted")
Pairs = list[tuple[str, str]]


def head(past: Past) -> Tree:
    """Return the headline: how it ended, what came of it."""
    verdict = past.verdict
    kind = verdict["kind"]
    tone = "good" if past.is_done else "calm" if kind in _CALM else "bad"
    said = {
        "done": "Done",
        RUNNING: "Not ended yet, as far as this directory tells",
        LOST: "The driver ended without a word: it was killed, or its machine was lost",
    }.get(kind, kind[:1].upper() + kind[1:])
    if code := verdict.get("exit_code"):
        said += f" (exit code {code})"
    last = [name for name in past.stages if name != "baseline"][-1:]
    metrics = past.metrics(last[0]) if last else {}
    best = next(iter(metrics.items()), None)
    return {
        "said": said,
        "tone": tone,
        "figures": verdict.get("figures", ""),
        "result": f"{last[0]}: {best[0]} {words.value(best[1])}" if best else "",
        "message": verdict.get("message", ""),
        "seen": verdict.get("seen", []),
        "cost": _lost(verdict.get("cost") or {}),
        "next": verdict.get("next", ""),
    }


def tiles(past: Past) -> list[tuple[str, str, str]]:
    """Return the few figures that stand above all: name, value, and what to add."""
    found = []
    stages = [name for name in past.stages if name != "baseline"]
    for name in stages[-1:]:
        for metric, each in list(past.metrics(name).items())[:1]:
            gain = past.summary.get("transfer", {}).get("gain")
            found.append(
                (f"{metric} of {name}", words.value(each), f"{gain:+.4f} by transfer" if gain else "")
            )
    # Stages that train jointly make each step together: it counts once.
    trained = opened.names(past.recipe) or list(past.stages)
    measured = [figures(past, name) for name in past.stages if name in trained]
    planned = [each.num_steps for each in measured]
    steps = sum(each.steps for each in measured)
    of = (
        f"of {sum(n for n in planned if n):,}"
        if all(planned) and steps < sum(n or 0 for n in planned)
        else ""
    )
    found.append(("steps", f"{steps:,}", of))
    if tokens := sum(each.tokens for each in measured):
        found.append(("tokens trained on", words.count(tokens) if tokens >= 1e8 else f"{tokens:,.0f}", ""))
    if past.ledger.whole_s:
        tries = f"{len(past.tries)} tries" if len(past.tries) > 1 else ""
        found.append(("time", words.duration(past.ledger.whole_s), tries))
        found.append(("goodput", words.share(past.ledger.goodput), "of all workers' time"))
    restarts = sum(event.get("kind") == "restart" for each in past.tries for event in each.events)
    if restarts:
        lost = int(past.ledger.is_lost.sum())
        found.append(("restarts", str(restarts), f"{lost:,} steps trained again" if lost else ""))
    if paid := cost.paid(past.plan, past.report):
        found.append(("cost", f"{paid:,.2f}", "price x time of all tries"))
    return found


def stages(past: Past) -> list[Tree]:
    """Return what came of each stage."""
    found = []
    for name, done in past.stages.items():
        measured = figures(past, name)
        facts: Pairs = [("steps", f"{measured.steps:,}" + _of(measured))]
        if samples := done.get("samples") or measured.samples:
            facts.append(("samples", f"{samples:,.0f}"))
        if measured.tokens:
            facts.append(("tokens", f"{measured.tokens:,.0f}"))
        if measured.tokens_per_s:
            facts.append(("tokens a second", f"{measured.tokens_per_s:,.0f}"))
        if measured.of_peak is not None:
            facts.append(("of the devices' peak", words.share(measured.of_peak)))
        if "num_parameters" in done:
            facts.append(("parameters trained", f"{done['num_trainable']:,} of {done['num_parameters']:,}"))
        facts += _data(past, name)
        if "padding" in done:
            facts.append(("padding", words.share(done["padding"])))
        if "best_step" in done:
            facts.append(("best step", f"{done['best_step']:,} (exported)"))
        summed = past.summary.get("stages", {}).get(name, {})
        if "verified" in summed:
            differs = f"differ by {summed['verified']:.2g}" if summed["verified"] else "are equal"
            facts.append(("export, read back", f"logits {differs}"))
        found.append(
            {
                "name": name,
                "task": "the last stage without the others"
                if name == "baseline"
                else past.asked(name).get("task"),
                "is_done": "steps" in done,
                "metrics": [(key, words.value(each)) for key, each in past.metrics(name).items()],
                "facts": facts,
                "notes": summed.get("notes", {}),
            }
        )
    return found


def _data(past: Past, stage: str) -> Pairs:
    """The size of a stage's data, and what of it was left out."""
    found = past.plan.get("data", {}).get(stage, {})
    rows: Pairs = [
        (f"rows to {verb}", f"{found[split]['rows']:,}")
        for split, verb in (("train", "train on"), ("eval", "evaluate on"))
        if found.get(split, {}).get("rows")
    ]
    names = (("bad", "bad rows left out"), ("skipped", "rows without loss left out"), ("cut", "samples cut"))
    return rows + [(name, f"{n:,}") for key, name in names if (n := found.get("train", {}).get(key))]


def transfer(past: Past) -> Tree | None:
    """Return what the stages before the last one gave to it, and what they lost."""
    found = past.summary.get("transfer", {})
    forgetting = {**found.get("forgetting", {})}
    for name, stage in past.stages.items():
        if "after" in stage and name not in forgetting:
            forgetting[name] = {"before": stage.get("metrics", {}), "after": stage["after"]}
    rows = [
        (
            name,
            metric,
            words.value(before),
            words.value(each["after"][metric]),
            words.signed(each["after"][metric] - before),
        )
        for name, each in forgetting.items()
        for metric, before in each["before"].items()
        if metric in each["after"]
    ]
    if "gain" not in found and not rows:
        return None
    gain = None
    if "gain" in found:
        how = "trained beside it" if found.get("is_joint") else "before it"
        gain = {
            "metric": found["metric"],
            "how": f"{', '.join(found['sources'])} {how}",
            "target": found["target"],
            "with": words.value(found["with"]),
            "without": words.value(found["without"]),
            "gain": words.signed(found["gain"]),
        }
    return {"gain": gain, "forgetting": rows}


def ledger(past: Past) -> Tree | None:
    """Return where the time went; its lines add up to the whole."""
    book = past.ledger
    if not book.whole_s:
        return None
    whole_worker_s = sum(book.worker_s.values())
    rows = [
        {
            "kind": kind,
            "label": label,
            "seconds": words.duration(book.seconds[kind]),
            "share": words.share(book.worker_s[kind] / whole_worker_s if whole_worker_s else 0.0),
            "width": 100 * book.worker_s[kind] / whole_worker_s if whole_worker_s else 0.0,
            "exact": f"{book.seconds[kind]:.3f}",
        }
        for kind, label in LINES.items()
        if book.seconds[kind] > 0
    ]
    between = sum(
        max(0.0, after.begun_s - before.ended_s)
        for before, after in zip(past.tries, past.tries[1:], strict=False)
    )
    return {
        "rows": rows,
        "startup": [
            (part, words.duration(seconds)) for part, seconds in book.startup.items() if seconds >= 0.001
        ],
        "whole": words.duration(book.whole_s),
        "whole_exact": f"{book.whole_s:.3f}",
        "worker_hours": f"{whole_worker_s / 3600:,.2f}",
        "goodput": words.share(book.goodput),
        "between": words.duration(between) if between > 1 else "",
        "lost": int(book.is_lost.sum()),
        "unsaved": int(book.is_unsaved.sum()) if not past.is_done else 0,
    }


def how(past: Past) -> Tree | None:
    """Return the recipe, and the commands that make the run again."""
    if not past.recipe_text:
        return None
    directory = past.run_dir.absolute()
    workers = past.summary.get("num_workers") or (past.tries[-1].num_workers if past.tries else None)
    again = ["python", "launcher/run.py", str(directory / "recipe.yaml"), "--ds", str(directory / "ds.json")]
    again += ["--workers", str(workers)] if workers else []
    return {
        "command": words.redacted(past.report.get("environment", {}).get("command", "")),
        "again": shlex.join([*again, "--name", f"{past.name}-again"]),
        "short": words.redacted(_short_recipe(past.recipe) or past.recipe_text),
        "whole": words.redacted(past.recipe_text),
        "ds": json.dumps(past.ds, indent=1) if past.ds else "",
        "ds_name": past.plan.get("ds", ""),
    }


def environment(past: Past) -> Pairs:
    """Return on what, and with what, the run was made."""
    told = past.report.get("environment", {})
    rows: Pairs = [(name, each) for name, each in told.get("versions", {}).items()]
    if commit := told.get("commit"):
        rows.append(("git commit", commit))
    cluster = past.plan.get("cluster", {})
    if cluster:
        device = (cluster.get("accelerator") or {}).get("name") or cluster.get("device")
        rows.append(("cluster", f"{cluster.get('num_nodes')} x {cluster.get('workers_per_node')} {device}"))
    begins = [e for e in past.record.events if e["kind"] == "stage_begin"]
    counts = dict.fromkeys(str(e["num_workers"]) for e in begins if "num_workers" in e)
    if counts:
        rows.append(("workers", ", then ".join(counts)))
    hosts = list(told.get("hosts", {}).values()) or [e["host"] for e in begins if "host" in e]
    if hosts:
        names = sorted(set(hosts))
        rows.append(
            (
                "hosts of workers",
                ", ".join(names[:16]) + (f" and {len(names) - 16} more" if len(names) > 16 else ""),
            )
        )
    if driver := told.get("driver") or past.verdict.get("host"):
        rows.append(("host of the driver", driver))
    if system := told.get("system"):
        rows.append(("system", system))
    return rows


def _short_recipe(tree: Tree) -> str:
    """What the recipe says beyond the defaults."""
    try:
        asked = recipes.parse(tree).model_dump(mode="json", exclude_defaults=True)
    except ValidationError:
        return ""
    return yaml.safe_dump(asked, sort_keys=False, allow_unicode=True, width=100)


def _lost(told: Tree) -> str:
    """What of the work was lost."""
    parts = []
    if told.get("steps"):
        parts.append(
            f"{told['steps']:,} steps and {words.duration(told['seconds'])} since the last checkpoint"
        )
    if told.get("restarts"):
        again = f", {told['again']:,} steps trained again" if told.get("again") else ""
        parts.append(f"{told['restarts']} restarts, {words.duration(told['restart_s'])}{again}")
    return "; ".join(parts)


def _of(measured: StageFigures) -> str:
    is_short = measured.num_steps and measured.steps < measured.num_steps
    return f" of {measured.num_steps:,}" if is_short else ""
