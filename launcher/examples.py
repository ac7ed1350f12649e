"""What the trained model of a stage answers on a few rows of its eval split, for a person to look at.

Written at the end of a stage, before its export. A run must not fail for it. What one rank makes of its own
answers is caught there, since no other rank waits for that. What goes wrong where ranks work together ends the
workers, as in evaluation; those that come after them find the file begun, and pass it by.
"""

import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from launcher import storage
from launcher.assembly import Context
from launcher.data.feed import MicroBatch
from launcher.data.order import Integers
from launcher.part import Part
from launcher.tasks.shown import Shown

FILE = "examples.json"
MOST_SHOWN = 40
MOST_ROWS, FEWEST_ROWS, MOST_TOKENS = 256, 8, 16_384
"""Looked at: so many rows, or fewer where they are long; about what a step of training reads."""
MOST_GENERATED_ROWS = 32
"""Looked at where each takes an answer that is generated."""

SHORT_ROWS, SHORT_TOKENS, SHORT_S, SHORT_BUDGET_TOKENS = 12, 48, 6.0, 2048
"""Rows that get a short answer where evaluation generates none; its tokens; seconds for all on one rank (a
sharded model can be slow at single tokens); and tokens of a micro-batch, so that little is kept of them."""


@dataclass(frozen=True, slots=True)
class Row:
    """What is shown of a row, and the id of its first sample."""

    sample: int
    shown: Shown


def write(context: Context, engine: Any, index: int, part: Part, tables: dict[str, Any]) -> None:
    """Write a part's examples, unless that was tried already; every rank must call it.

    Args:
        context: of this rank.
        engine: with the model as it will be exported.
        index: of the part.
        part: nothing happens if it has no eval split.
        tables: what its task found beside the metrics, over the whole split.
    """
    if part.facts.eval is None or not _is_first(context, part, tables):
        return
    if part.plan.team > 1:
        return  # A rank has only pieces of samples.
    begun_s, context.pulse.phase = time.monotonic(), "evaluate"
    rows, num_looked_at, num_rows, faults = look(context, engine, index, part)
    event = {"stage": part.name, "num": num_looked_at, "seconds": round(time.monotonic() - begun_s, 3)}
    context.recorder.write("examples", **event, **({"fault": faults[0]} if faults else {}))
    if context.rank == 0:
        found = {"num": num_looked_at, "of": num_rows, "samples": [row.shown.tree() for row in rows]}
        _write(context, part, found | tables)


def look(context: Context, engine: Any, index: int, part: Part) -> tuple[list[Row], int, int, list[str]]:
    """Look at rows drawn from the eval split, and choose some of them; every rank must call it.

    Returns:
        The rows chosen; how many were looked at, and how many there are; what went wrong, on any rank.
    """
    task = part.task
    most_rows = MOST_GENERATED_ROWS if task.generates else MOST_ROWS
    samples, num_rows = part.drawn(most_rows, MOST_TOKENS, fewest_rows=FEWEST_ROWS)
    rows, faults = _answered(context, engine, index, part, samples)
    is_short = task.generates_shown and not task.generates and engine.model(index).can_generate()
    chosen = chosen_of(rows, SHORT_ROWS if is_short else MOST_SHOWN)
    if is_short and chosen:
        try:
            again, more = _answered_shortly(context, engine, index, part, chosen)
            chosen, faults = chosen_of(again, SHORT_ROWS), faults + more
        except (ValueError, TypeError, AttributeError, LookupError, NotImplementedError) as error:
            # Some models refuse to generate: for a reason that they have on all ranks alike.
            faults.append(_fault(part, error))
    return chosen, len(rows), num_rows, faults


def chosen_of(rows: Sequence[Row], most: int) -> list[Row]:
    """Choose rows to show: half of them those that tell most about what goes wrong, where there are so many,
    the others from all that went well, or else from the rest.

    Args:
        rows: in any order: the same ones are chosen.
        most: choose so many, if there are.

    Returns:
        Them, the most telling first.
    """
    ordered = sorted(rows, key=lambda row: (row.shown.is_right is True, -row.shown.badness, row.sample))
    bad = [row for row in ordered if row.shown.is_right is not True]
    good = ordered[len(bad) :]
    num_good = min(len(good), most - min(len(bad), most - most // 2))
    told = bad[: most // 2]
    rest = bad[len(told) :]
    return [*told, *_spread(rest, most - len(told) - num_good), *_spread(good, num_good)]


def _spread(rows: list[Row], count: int) -> list[Row]:
    """Take so many rows, if there are, at even distances; the first and the last among them."""
    if count >= len(rows):
        return rows
    return [rows[i * (len(rows) - 1) // max(1, count - 1)] for i in range(count)]


def _answered_shortly(
    context: Context, engine: Any, index: int, part: Part, rows: list[Row]
) -> tuple[list[Row], list[str]]:
    """Answer rows again, with short generated answers."""
    ids = np.array(sorted(row.sample for row in rows), dtype=np.int64)
    num_batches = sum(1 for _ in part.eval_batches(ids, SHORT_BUDGET_TOKENS))
    limits = {"max_new_tokens": SHORT_TOKENS, "max_time": SHORT_S / num_batches, "num_beams": 1}
    return _answered(context, engine, index, part, ids, SHORT_BUDGET_TOKENS, limits)


def _answered(
    context: Context,
    engine: Any,
    index: int,
    part: Part,
    samples: Integers,
    budget_tokens: int | None = None,
    limits: dict[str, Any] | None = None,
) -> tuple[list[Row], list[str]]:
    """Return what is shown of some samples, from all ranks, and what went wrong on any."""
    rows: list[Row] = []
    faults: list[str] = []

    def take(batch: MicroBatch, given: dict[str, Any], outputs: Any, generated: Any) -> None:
        if not len(batch.samples):
            return
        try:
            told = part.task.shown(outputs, given, generated)
            rows.extend(Row(int(i), each) for i, each in zip(batch.rows, told, strict=True))
        except Exception as error:  # The other ranks go on to their next batch, and need this one there.
            faults.append(_fault(part, error))

    batches = context.pulse.counted(part.eval_batches(samples, budget_tokens))
    engine.answer(index, batches, take, limits)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (rows, faults))
    return [row for mine, _ in gathered for row in mine], [fault for _, mine in gathered for fault in mine]


def _fault(part: Part, error: Exception) -> str:
    logging.getLogger(__name__).error("examples of stage %s", part.name, exc_info=error)
    return f"{type(error).__name__}: {error}"[:300]


def _is_first(context: Context, part: Part, tables: dict[str, Any]) -> bool:
    """Whether nobody has tried before, by rank 0's word, which writes down that somebody has."""
    is_first = context.rank == 0 and storage.read_json(context.stage_dir(part.name) / FILE) is None
    if is_first:
        _write(context, part, {"samples": []} | tables)
    told = torch.tensor([int(is_first)], device=context.device)
    dist.broadcast(told, 0)
    return bool(told.item())


def _write(context: Context, part: Part, found: dict[str, Any]) -> None:
    told = {"task": part.asked.task, "score": part.task.score} | found
    with contextlib.suppress(OSError):  # A full disk is told by the export.
        storage.write_json(context.stage_dir(part.name) / FILE, told)
