"""The panel: a run's progress as something that rich draws. Knows no terminal, only a width."""

from rich import box
from rich.console import Group, OverflowMethod, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from launcher.report import curve, lines, words
from launcher.report.progress import Progress, Stage

LABEL_WIDTH, LEAST_WIDTH = 10, 30
CURVE_HEIGHT, NARROW = 3, 70
SILENT_S = 10.0
"""After so long without a step, and many times a step's time, it is said since when none came."""


def panel(progress: Progress, now_s: float, width: int, *, is_plain: bool = False) -> Panel:
    """Return the panel.

    Args:
        progress: what to show.
        now_s: by the clock.
        width: columns of the terminal.
        is_plain: whether it has only plain characters.
    """
    inner = max(LEAST_WIDTH, width - 4)
    parts: list[RenderableType] = []
    if progress.stages:
        parts += [_stages(progress, inner, is_plain=is_plain), Text()]
    rows = Table.grid(padding=(0, 1))
    rows.add_column(width=LABEL_WIDTH - 1, style="dim", no_wrap=True)
    rows.add_column()
    room = inner - LABEL_WIDTH
    if progress.losses:
        rows.add_row("loss", _loss(progress, room, is_plain=is_plain))
    for label, chips in _rows(progress, now_s):
        if chips := [chip for chip in chips if chip]:
            rows.add_row(label, _flow(chips, room, is_plain=is_plain))
    parts.append(rows)
    borders = box.ASCII if is_plain else box.ROUNDED
    title = Text(progress.name[: inner - 4], style="bold", no_wrap=True) if progress.name else None
    return Panel(Group(*parts), title=title, title_align="left", box=borders, width=width, border_style="dim")


def _stages(progress: Progress, width: int, *, is_plain: bool) -> Table:
    """All stages: what is done with its metrics, what trains with a bar, what is to come."""
    table = Table.grid(padding=(0, 1), expand=True)
    longest = max(len(name) for name in progress.stages)
    table.add_column(width=1)
    overflow: OverflowMethod = "crop" if is_plain else "ellipsis"
    table.add_column(width=min(longest, width // 4), no_wrap=True, overflow=overflow)
    table.add_column(ratio=1, no_wrap=True, overflow=overflow)
    table.add_column(justify="right", no_wrap=True)
    for stage in progress.stages.values():
        is_now = stage.name == progress.stage and not stage.is_done
        mark, style = _MARKS["done" if stage.is_done else "now" if is_now else "to come"]
        if is_plain:
            mark = {"✓": "+", "▶": ">", "·": "."}[mark]
        middle: RenderableType = Text(words.metrics(stage.metrics), style="dim")
        right = f"{stage.num_steps:,} steps" if stage.num_steps else ""
        if is_now:
            total, at = progress.num_steps, progress.step
            middle = ProgressBar(total=total or 1, completed=at, complete_style="cyan")
            right = f"{at:,}/{total:,} {at / total:4.0%}" if total else ""
        table.add_row(Text(mark, style=style), Text(stage.name, style=style), middle, Text(right))
    return table


def _loss(progress: Progress, room: int, *, is_plain: bool) -> RenderableType:
    """The last loss beside a curve of those before it."""
    first, loss = progress.losses[0]
    values = [value for _, value in progress.losses]
    words = [Text(f"{progress.last['loss']:.4f}", style="bold"), Text(f"from {loss:.4f}", style="dim")]
    words.append(Text(f"at step {first:,}", style="dim"))
    height = 1 if is_plain else 2 if room < NARROW - LABEL_WIDTH else CURVE_HEIGHT
    word_width = max(word.cell_len for word in words[:height])
    width = min(60, room - word_width - 2)
    drawn = curve.plain(values, width) if is_plain else curve.braille(values, width, height)
    table = Table.grid(padding=(0, 2))
    for word, line in zip(words, drawn, strict=False):
        table.add_row(word, Text(line, style="cyan", no_wrap=True))
    return table


def _rows(progress: Progress, now_s: float) -> list[tuple[str, list[str]]]:
    """What stands below, as labels and pieces that belong together."""
    last = progress.last
    shown = [
        ("metrics", _metrics(progress)),
        ("speed", _speed(progress)),
        (
            "memory",
            lines.memory(progress).removeprefix("memory of a worker: ").split(", "),
        ),
        ("waits", _shares(progress)),
        ("saved", _saved(progress, now_s)),
        ("workers", _workers(progress)),
        ("left", _left(progress)),
        ("now", [_now(progress, now_s)]),
    ]
    if not last and progress.preparation and not progress.stage:
        shown.insert(0, ("data", [lines.preparation(progress.preparation)]))
    return shown


def _metrics(progress: Progress) -> list[str]:
    """The last evaluation of each part that trains; of stages before, their own line tells."""
    found = []
    for name, values in progress.evaluated.items():
        is_other = name in progress.stages and name != progress.stage
        if not is_other:
            prefix = "" if name == progress.stage else f"{name} "
            found += [f"{prefix}{metric} {value:.4f}" for metric, value in values.items()]
    return found


def _speed(progress: Progress) -> list[str]:
    if not progress.last:
        return []
    tokens, samples, mfu = progress.per_second("tokens"), progress.per_second("samples"), progress.mfu()
    return [
        f"{tokens:,.0f} tokens/s" if tokens else "",
        f"{samples:,.1f} samples/s" if samples else "",
        f"MFU {mfu:.1%}" if mfu is not None else "",
        f"lr {progress.last['lr']:.2e}",
        f"epoch {progress.last['epoch'] + 1}" if "epoch" in progress.last else "",
    ]


def _shares(progress: Progress) -> list[str]:
    named = (
        ("data", progress.data_share()),
        ("checkpoints", progress.checkpoint_share()),
        ("padding", progress.padding()),
    )
    return [f"{name} {share:.1%}" for name, share in named if share is not None]


def _saved(progress: Progress, now_s: float) -> list[str]:
    found = []
    if progress.saved:
        ago = lines.duration(max(0.0, now_s - progress.saved["time"]))
        found.append(f"step {progress.saved['step']:,}, {ago} ago")
    elif progress.begun.get("start"):
        found.append(f"step {progress.begun['start']:,}")
    return found + [
        each.replace("next checkpoint", "next") for each in lines.next_checkpoint(progress, now_s)
    ]


def _workers(progress: Progress) -> list[str]:
    if not progress.begun:
        return []
    num_workers, num_nodes = progress.begun["num_workers"], progress.begun.get("num_nodes")
    where = f" on {num_nodes} node{'s' * (num_nodes > 1)}" if num_nodes else ""
    times = (
        f"{progress.restarts} restart{'s' * (progress.restarts > 1)}" if progress.restarts else "no restarts"
    )
    return [f"{num_workers} worker{'s' * (num_workers > 1)}{where}", times]


def _left(progress: Progress) -> list[str]:
    stage_s, run_s = progress.stage_left_s(), progress.run_left_s()
    found = [] if stage_s is None else [f"{lines.duration(stage_s)} of this stage"]
    if run_s is not None and _to_come(progress):
        found.append(f"about {lines.duration(run_s)} of the run")
    return found


def _to_come(progress: Progress) -> list[Stage]:
    return [each for each in progress.stages.values() if not each.is_done and each.name != progress.stage]


def _now(progress: Progress, now_s: float) -> str:
    """What goes on while no step comes."""
    if progress.said or not progress.last:
        return progress.said
    silent_s, step_s = now_s - progress.last["time"], progress.last.get("step_s", 0)
    if silent_s < max(SILENT_S, 5 * step_s) or progress.step >= progress.num_steps:
        return ""
    return f"no step for {lines.duration(silent_s)}"


def _flow(chips: list[str], room: int, *, is_plain: bool) -> Text:
    """Put pieces into lines that break between them."""
    found: list[str] = []
    between = " | " if is_plain else " · "
    for chip in chips:
        if found and len(found[-1]) + len(between) + len(chip) <= room:
            found[-1] += between + chip
        else:
            found.append(chip)
    return Text("\n".join(found), overflow="crop" if is_plain else "ellipsis", no_wrap=True)


_MARKS = {"done": ("✓", "green"), "now": ("▶", "bold cyan"), "to come": ("·", "dim")}
