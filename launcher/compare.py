"""Runs side by side: figures, what they were asked differently, curves on top of each other."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent
if str(ROOT.parent) not in sys.path:
    # Run as a script, Python puts this folder on the path, not the one above it.
    sys.path[0] = str(ROOT.parent)

from launcher import storage  # noqa: E402
from launcher.errors import LauncherError, StorageError, tell  # noqa: E402

if TYPE_CHECKING:
    from launcher.report.comparison import Comparison
    from launcher.report.past import Past


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        _compare(arguments.run, arguments.html)
    except LauncherError as error:
        return tell(error)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launcher.compare", description=__doc__)
    parser.add_argument(
        "run", type=Path, nargs="+", help="run directories; one made with --seeds stands for all of its seeds"
    )
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="write a page with the curves too; of a single run, its report once more",
    )
    return parser


def _compare(run_dirs: list[Path], html: Path | None) -> None:
    # Imported late: --help needs no numpy.
    from launcher.report import comparison, past

    found = [past.read(run_dir) for run_dir in comparison.expanded(run_dirs)]
    if html is not None:
        _write(html, run_dirs, found)
    _print(comparison.compare(found))
    if html is not None:
        print(f"page: {html}")


def _write(html: Path, run_dirs: list[Path], found: "list[Past]") -> None:
    """Write the page of several runs, or of one its report."""
    from launcher.report import comparison, page

    if len(found) == 1:
        text = page.html(found[0])
    else:
        seeds = storage.read_json(run_dirs[0] / "summary.json") if len(run_dirs) == 1 else None
        text = comparison.html(found, " · ".join(each.absolute().name for each in run_dirs[:4]), seeds)
    try:
        storage.write_text(html, text)
    except OSError as error:
        raise StorageError(f"--html {html}: cannot be written: {error.strerror}") from None


def _print(compared: "Comparison") -> None:
    from rich import box
    from rich.console import Console

    console = Console(soft_wrap=False)
    if not console.is_terminal:
        console.width = 40 + 36 * len(compared.names)
    for rows in compared.tables:
        console.print(_table(rows, compared.names, box.SIMPLE_HEAD))
    for rows in compared.differences if len(compared.names) > 1 else []:
        console.print(_table(rows, compared.names, box.SIMPLE_HEAD, "what differs: "))


def _table(rows: Any, names: list[str], lines: Any, before: str = "") -> Any:
    from rich.table import Table
    from rich.text import Text

    # Text, since what users wrote may look like rich's markup.
    table = Table(title=Text(before + rows.title), title_justify="left", box=lines, title_style="bold")
    for name in ["", *names]:
        table.add_column(Text(name), overflow="fold")
    for key, values in rows.rows:
        table.add_row(Text(key), *map(Text, values))
    return table


if __name__ == "__main__":
    sys.exit(main())
