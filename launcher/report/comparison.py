"""Several runs side by side: their figures, and what they were asked differently, key by key. Pure but for the page."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from launcher import recipe as recipes
from launcher import storage
from launcher.errors import BadInput
from launcher.report import cost, measured, opened, page, past, plots, sections, words
from launcher.report.forecast import size
from launcher.report.past import Past, Tree

NOTHING = "-"


@dataclass(frozen=True, slots=True)
class Rows:
    """A table: one row a figure or key, one column a run."""

    title: str
    rows: list[tuple[str, list[str]]]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Runs side by side.

    Attributes:
        names: of the runs, each another.
        tables: figures of the runs and of each stage.
        differences: of recipes, ds configs and environments: only keys whose values differ.
    """

    names: list[str]
    tables: list[Rows]
    differences: list[Rows]


def compare(pasts: Sequence[Past]) -> Comparison:
    """Return runs side by side."""
    stages = dict.fromkeys(name for told in pasts for name in told.stages)
    tables = [_whole(pasts), *(_stage(pasts, name) for name in stages)]
    differences = [
        Rows("recipe", differing(_by_name(pasts))),
        Rows("ds config", differing([told.ds for told in pasts])),
        Rows("made with", differing([dict(sections.environment(told)) for told in pasts])),
    ]
    return Comparison(
        _names(pasts), [each for each in tables if each.rows], [d for d in differences if d.rows]
    )


def differing(trees: Sequence[Tree]) -> list[tuple[str, list[str]]]:
    """Return the keys, with dots, whose values are not the same in all trees, and the values."""
    flat = [_flat("", tree) for tree in trees]
    keys = dict.fromkeys(key for each in flat for key in each)
    rows = [(key, [_word(each[key]) if key in each else NOTHING for each in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def html(pasts: Sequence[Past], title: str, spread: Tree | None = None) -> str:
    """Return the page of several runs.

    Args:
        pasts: the runs.
        title: of the page.
        spread: mean and spread of every metric, where the runs differ by their seeds only.
    """
    found = compare(pasts)
    named = list(zip(found.names, pasts, strict=True))
    stages = dict.fromkeys(name for told in pasts for name in told.stages)
    curves = [{"name": name, "charts": drawn} for name in stages if (drawn := plots.of_runs(named, name))]
    return page.template("comparison.html").render(
        title=title,
        names=found.names,
        heads=[sections.head(told) for told in pasts],
        tables=found.tables,
        differences=found.differences,
        curves=curves,
        num_colours=plots.NUM_COLOURS,
        spread=_spread(spread or {}),
        zone=words.zone(),
    )


def expanded(run_dirs: Sequence[Path]) -> list[Path]:
    """Return the runs; in place of one that was made with several seeds, these.

    Raises:
        BadInput: a directory is missing.
    """
    found: list[Path] = []
    for run_dir in run_dirs:
        if not run_dir.is_dir():
            raise BadInput(f"{run_dir}: no such directory: give the directories of runs")
        is_run = (run_dir / "recipe.yaml").exists() or (run_dir / "metrics.jsonl").exists()
        found += ([] if is_run else opened.seeds(run_dir)) or [run_dir]
    return found


def write_seeds(run_dir: Path) -> Path:
    """Write report.html of a run that was made with several seeds: their spread, and all of them side by side.

    With fewer seeds than once before, these are the first ones: as many as summary.json tells of.

    Raises:
        BadInput: this is no such run's directory.
        OSError: the page cannot be written.
    """
    spread = storage.read_json(run_dir / "summary.json") or {}
    found = [past.read(each) for each in expanded([run_dir])[: spread.get("num_seeds")]]
    path = run_dir / page.FILE
    storage.write_text(path, html(found, run_dir.absolute().name, spread))
    return path


def _whole(pasts: Sequence[Past]) -> Rows:
    rows: list[tuple[str, list[Any]]] = [
        ("verdict", [told.verdict["kind"] for told in pasts]),
        ("begun", [words.clock(told.tries[0].begun_s) if told.tries else None for told in pasts]),
        ("workers", [dict(sections.environment(told)).get("workers") for told in pasts]),
        ("cluster", [dict(sections.environment(told)).get("cluster") for told in pasts]),
        ("time of all tries", [_if(told.ledger.whole_s, words.duration) for told in pasts]),
        ("goodput", [_if(told.ledger.goodput, words.share) for told in pasts]),
        ("tries", [str(len(told.tries)) for told in pasts]),
        ("restarts", [str(_restarts(told)) for told in pasts]),
        ("steps trained again", [f"{int(told.ledger.is_lost.sum()):,}" for told in pasts]),
        ("cost", [_if(cost.paid(told.plan, told.report), lambda paid: f"{paid:,.2f}") for told in pasts]),
        (
            "gain by transfer",
            [_if(told.summary.get("transfer", {}).get("gain"), words.signed) for told in pasts],
        ),
    ]
    return Rows("the whole run", _told(rows))


def _stage(pasts: Sequence[Past], stage: str) -> Rows:
    """The figures of one stage; nothing in the column of a run without it."""
    here = [told if stage in told.stages else None for told in pasts]
    metrics = [told.metrics(stage) if told else {} for told in here]
    after = [told.stages[stage].get("after", {}) if told else {} for told in here]
    found = [measured.figures(told, stage) if told else None for told in here]
    done = [told.stages[stage] if told else {} for told in here]
    used = [each.get("memory", {}) for each in done]
    rows: list[tuple[str, list[Any]]] = [
        *((name, [_if(each.get(name), words.value) for each in metrics]) for name in _keys(metrics)),
        *(
            (f"{name} at the end", [_if(each.get(name), words.value) for each in after])
            for name in _keys(after)
        ),
        ("steps", [_if(each and each.steps, words.value) for each in found]),
        ("samples", [_if(each.get("samples"), words.value) for each in done]),
        ("tokens", [_if(each and int(each.tokens), words.value) for each in found]),
        ("a step (median)", [_if(each and each.step_s, words.duration) for each in found]),
        ("tokens a second", [_if(each and each.tokens_per_s, lambda n: f"{n:,.0f}") for each in found]),
        ("of the devices' peak", [_if(each and each.of_peak, words.share) for each in found]),
        ("waited for data", [_if(each.get("data_wait"), words.share) for each in done]),
        ("padding", [_if(each.get("padding"), words.share) for each in done]),
        ("GPU memory of a worker", [_if(each.get("device"), size) for each in used]),
        ("host memory of a worker", [_if(each.get("host"), size) for each in used]),
        ("parameters trained", [_if(each.get("num_trainable"), words.value) for each in done]),
    ]
    return Rows(f"stage {stage}", _told(rows))


def _told(rows: list[tuple[str, list[Any]]]) -> list[tuple[str, list[str]]]:
    """Leave out what no run tells."""
    return [
        (name, [NOTHING if each is None else str(each) for each in values])
        for name, values in rows
        if any(each is not None for each in values)
    ]


def _if(value: Any, in_words: Any) -> str | None:
    return None if value is None or value == 0 else in_words(value)


def _keys(trees: Sequence[Tree]) -> list[str]:
    return list(dict.fromkeys(key for tree in trees for key in tree))


def _restarts(told: Past) -> int:
    return sum(event.get("kind") == "restart" for each in told.tries for event in each.events)


def _names(pasts: Sequence[Past]) -> list[str]:
    """The runs' names; where two are alike, with as much of the path before it as it takes."""
    paths = [told.run_dir.absolute() for told in pasts]
    for num_parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-num_parts:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    return [name if names.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(names)]


def _by_name(pasts: Sequence[Past]) -> list[Tree]:
    """The recipes with their stages by name, and with all defaults, so that like is compared with like.

    Of a stage that not all runs have, only that is told.
    """
    found = []
    for told in pasts:
        try:
            tree = recipes.parse(told.recipe).model_dump(mode="json")
        except ValidationError:
            tree = told.recipe
        stages = tree.get("stages") or []
        found.append({**tree, "stages": {str(each.get("name")): each for each in stages}})
    shared = set.intersection(*(set(tree["stages"]) for tree in found))
    for tree in found:
        tree["stages"] = {n: each if n in shared else "is there" for n, each in tree["stages"].items()}
    return found


def _flat(key: str, value: Any) -> Tree:
    if isinstance(value, dict) and value:
        pairs = [(f"{key}.{name}" if key else str(name), each) for name, each in value.items()]
    elif isinstance(value, list) and any(isinstance(each, dict) for each in value):
        pairs = [(f"{key}.{i}", each) for i, each in enumerate(value)]
    else:
        return {key: value}
    return {name: leaf for path, each in pairs for name, leaf in _flat(path, each).items()}


def _word(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else words.redacted(str(value))


def _spread(told: Tree) -> list[tuple[str, str, str, str, str]]:
    """Mean and spread over seeds: stage, metric, mean, standard deviation, values."""
    rows = [
        (name if kind == "metrics" else f"{name}, at the end of the run", metric, each)
        for name, stage in told.get("stages", {}).items()
        for kind in ("metrics", "after")
        for metric, each in stage.get(kind, {}).items()
    ]
    if "gain" in told.get("transfer", {}):
        rows.append(("gain by transfer", told["transfer"]["metric"], told["transfer"]["gain"]))
    return [
        (
            name,
            metric,
            words.value(each["mean"]),
            words.value(each["stdev"]),
            "  ".join(map(words.value, each["values"])),
        )
        for name, metric, each in rows
    ]
