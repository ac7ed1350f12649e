"""report.html: one file that tells a whole run, opens without a network, and is read on a telephone too."""

from pathlib import Path
from typing import Any

import jinja2

from launcher import storage
from launcher.report import answers, charts, events, measured, past, plots, sections, words
from launcher.report.ledger import LINES
from launcher.report.past import Past

FILE = "report.html"
_MOST_TRIES = 10


def write(run_dir: Path, path: Path | None = None) -> Path:
    """Write the page of a run.

    Args:
        run_dir: the run's; whatever of its files is missing leaves its section out.
        path: where to; default: report.html in the run directory.

    Returns:
        Where it is.

    Raises:
        BadInput: this is no run's directory.
        OSError: the page cannot be written.
    """
    path = path or run_dir / FILE
    storage.write_text(path, html(past.read(run_dir)))
    return path


def html(told: Past) -> str:
    """Return the page of a run."""
    stages = sections.stages(told)
    answered = {
        name: answers.told(each["examples"]) for name, each in told.stages.items() if "examples" in each
    }
    return template("run.html").render(
        title=told.name,
        head=sections.head(told),
        begun=words.clock(told.tries[0].begun_s) if told.tries else "",
        zone=words.zone(),
        tiles=sections.tiles(told),
        stages=stages,
        transfer=sections.transfer(told),
        curves=[
            {"name": name, "charts": drawn, "lost": plots.num_lost(told, name)}
            for name in told.stages
            if (drawn := plots.of_run(told, name))
        ],
        ledger=sections.ledger(told),
        strip=_strip(told),
        events=events.told(told),
        checkpoints=events.checkpoints(told),
        plan=measured.plan(told),
        answers={name: each for name, each in answered.items() if each},
        how=sections.how(told),
        environment=sections.environment(told),
    )


def template(name: str) -> jinja2.Template:
    """Return a page's template: everything that it is given is escaped, unless it says that it is drawn here."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    found = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    found.filters["clock"] = words.clock
    found.globals["kinds"] = tuple(LINES)
    return found.get_template(name)


def _strip(told: Past) -> dict[str, Any] | None:
    tries = told.tries
    names = [f"try {i + 1}" if len(tries) > 1 else "" for i in range(len(tries))]
    rows = [(name, spans) for name, spans in zip(names, told.ledger.spans, strict=True) if spans]
    if not rows:
        return None
    kinds = {each.kind for _, spans in rows[-_MOST_TRIES:] for each in spans}
    return {
        "svg": charts.stretches(rows[-_MOST_TRIES:]),
        "kinds": [kind for kind in LINES if kind in kinds],
        "labels": LINES,
        "left_out": max(0, len(rows) - _MOST_TRIES),
    }
