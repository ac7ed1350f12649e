"""What people read after a run: its page and the cards of its models. Whatever goes wrong here, the run ends as it ends."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def tell(run_dir: Path) -> Path | None:
    """Write report.html, and the card of each exported model.

    Args:
        run_dir: of the run.

    Returns:
        The page; None where it cannot be written.
    """

    # Imported late, here and below: a start needs no charts.
    from launcher.report import past

    told = _tried(lambda: past.read(run_dir), run_dir, "report.html")
    if told is None:
        return None

    def write() -> Path:
        from launcher.report import page

        return page.write(told)

    def write_cards() -> None:
        from launcher.report import card

        card.write_all(told)

    written = _tried(write, run_dir, "report.html")
    _tried(write_cards, run_dir, "the models' cards")
    return written


def tell_seeds(run_dir: Path) -> Path | None:
    """Write report.html over the runs of several seeds; return it, or None where it cannot be written."""

    def write() -> Path:
        from launcher.report import comparison

        return comparison.write_seeds(run_dir)

    return _tried(write, run_dir, "report.html")


def _tried(write: Callable[[], T], run_dir: Path, what: str) -> T | None:
    try:
        return write()
    except (Exception, KeyboardInterrupt) as error:
        logging.getLogger(__name__).warning("%s: %s cannot be written: %r", run_dir, what, error)
        return None
