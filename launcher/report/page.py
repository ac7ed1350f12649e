"""report.html: one file that tells a whole run, opens without a network, and is read on a telephone too."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jinja2

from launcher import storage
from launcher.report import answers, charts, events, measured, plots, sections, words
from launcher.report.ledger import LINES
from launcher.report.past import Past

FILE = "report.html"
_MOST_TRIES = 10
T = TypeVar("T")


def write(told: Past, path: Path | None = None) -> Path:
    """Write the page of a run.

    Args:
        told: the run; whatever of its files is missing leaves its section out.
        path: where to; default: report.html in the run directory.

    Returns:
        Where it is.

    Raises:
        OSError: the page cannot be written.
    """
    path = path or told.run_dir / FILE
    storage.write_text(path, html(told))
    return path


def html(told: Past) -> str:
    """Return the page of a run. A section that cannot be made is left out, and the page says so."""
    left_out: list[str] = []

    def made(name: str, make: Callable[[], T]) -> T | None:
        try:
            return make()
        except Exception as error:  # A file of another version, or mended by hand: the rest is worth showing.
            left_out.append(f"{name} ({type(error).__name__}: {error})")
            return None

    return template("run.html").render(
        title=told.name,
        head=made("how it ended", lambda: sections.head(told)) or {},
        begun=words.clock(told.tries[0].begun_s) if told.tries else "",
        zone=words.zone(),
        tiles=made("the figures on top", lambda: sections.tiles(told)),
        stages=made("stages", lambda: sections.stages(told)),
        transfer=made("transfer", lambda: sections.transfer(told)),
        curves=[made(f"curves of {name}", partial(_curves, told, name)) for name in told.stages],
        ledger=made("where the time went", lambda: sections.ledger(told)),
        strip=made("the drawing of the tries", lambda: _strip(told)),
        events=made("what happened", lambda: events.told(told)),
        checkpoints=made("checkpoints", lambda: events.checkpoints(told)),
        plan=made("the plan", lambda: measured.plan(told)),
        answers={
            name: made(f"answers of {name}", partial(answers.told, stage["examples"]))
            for name, stage in told.stages.items()
            if "examples" in stage
        },
        how=made("how to make it again", lambda: sections.how(told)),
        environment=made("made with", lambda: sections.environment(told)),
        left_out=left_out,
    )


def template(name: str) -> jinja2.Template:
    """Return a page's template: everything that it is given is redacted and escaped, unless it says that it is drawn here."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    found = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_redacted
    )
    found.filters["clock"] = words.clock
    found.globals["kinds"] = tuple(LINES)
    return found.get_template(name)


def _redacted(value: Any) -> Any:
    if isinstance(value, list | tuple | dict):
        value = str(value)
    # Of type str only: markup is drawn here, or was redacted before it was made.
    return words.redacted(value) if type(value) is str else value


def _curves(told: Past, stage: str) -> dict[str, Any]:
    return {"name": stage, "charts": plots.of_run(told, stage), "lost": plots.num_lost(told, stage)}


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
