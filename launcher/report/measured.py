"""What is measured of each stage, and what was planned of it. Pure."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from launcher.report import words
from launcher.report.forecast import size
from launcher.report.past import Past, Tree


@dataclass(frozen=True, slots=True)
class StageFigures:
    """What is measured of a stage.

    Attributes:
        steps: that count.
        num_steps: that were planned; None: unknown.
        tokens, samples: of these steps.
        step_s: the median of a step; None without steps.
        tokens_per_s: over all of these steps; None without.
    """

    steps: int
    num_steps: int | None
    tokens: float
    samples: float
    step_s: float | None
    tokens_per_s: float | None


def figures(past: Past, stage: str) -> StageFigures:
    """Return what is measured of a stage."""
    record = past.record
    begins = [e for e in record.events if e["kind"] == "stage_begin" and e["stage"] == stage]
    num_steps = begins[-1]["num_steps"] if begins else None
    if stage not in record.stages:
        done = past.stages.get(stage, {})
        return StageFigures(done.get("steps", 0), num_steps, 0.0, float(done.get("samples", 0)), None, None)
    here = (record.stage == record.stages.index(stage)) & ~past.ledger.is_lost
    took = record.column("step_s")[here]
    tokens = float(np.nansum(record.column("tokens")[here]))
    seconds = float(np.nansum(took))
    return StageFigures(
        steps=int(record.step[here].max(initial=0)),
        num_steps=num_steps,
        tokens=tokens,
        samples=float(np.nansum(record.column("samples")[here])),
        step_s=float(np.nanmedian(took)) if len(took) else None,
        tokens_per_s=tokens / seconds if seconds else None,
    )


def plan(past: Past) -> list[Tree]:
    """Return what was planned of each stage beside what was measured."""
    found = []
    for name, planned in past.plan.get("stages", {}).items():
        measured = figures(past, name)
        rows = [
            ("steps", _number(planned.get("num_steps") or measured.num_steps), _number(measured.steps), "")
        ]
        step_s = planned.get("step_s")
        if step_s or measured.step_s:
            rows.append(("a step (median)", *_pair(step_s, measured.step_s, words.duration)))
            num_steps = planned.get("num_steps") or measured.num_steps or 0
            took_s = (measured.step_s or 0.0) * measured.steps
            if step_s and num_steps:
                rows.append(("all steps", *_pair(step_s * num_steps, took_s or None, words.duration)))
        rows += _memory(past, name, planned)
        found.append({"name": name, "rows": rows})
    return found


def _memory(past: Past, name: str, planned: Tree) -> list[tuple[str, str, str, str]]:
    """Bytes of a worker at the peak."""
    compared = past.summary.get("stages", {}).get(name, {}).get("memory", {})
    used = past.stages.get(name, {}).get("memory", {})
    on_gpu = bool(past.plan.get("cluster", {}).get("accelerator"))
    rows = []
    for place, label in (("device", "GPU memory of a worker"), ("host", "host memory of a worker")):
        said = compared.get(place, {}).get("predicted")
        if said is None and on_gpu and place == "device":
            said = planned.get("device_bytes")
        was = compared.get(place, {}).get("used") or used.get(place)
        if said or was:
            rows.append((label, *_pair(said, was, size)))
    room = planned.get("device_room") if on_gpu else None
    if room:
        rows.append(("GPU memory to plan with", size(room), "", ""))
    return rows


def _number(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _pair(said: Any, was: Any, name: Any) -> tuple[str, str, str]:
    ratio = f"{was / said:.2f} x" if said and was else ""
    return name(said) if said else "-", name(was) if was else "-", ratio
