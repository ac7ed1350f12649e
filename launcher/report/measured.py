"""What is measured of each stage, and what was planned of it. Pure."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
        tokens_per_s: over these steps, without the first after each start; None without steps.
        of_peak: the model's floating-point operations in that time, as a share of what all workers' devices can do at
            best; None where either is unknown.
    """

    steps: int
    num_steps: int | None
    tokens: float
    samples: float
    step_s: float | None
    tokens_per_s: float | None
    of_peak: float | None = None


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
    tokens = record.column("tokens")
    # The first step after a start restores, compiles and warms up: no speed is told by it, if there are others.
    usual = here.copy()
    usual[[i for e, i in zip(record.events, record.places, strict=True) if _is_before_step(e, i, here)]] = (
        False
    )
    usual = usual if usual.any() else here
    seconds = float(np.nansum(record.column("step_s")[usual]))
    tokens_per_s = float(np.nansum(tokens[usual])) / seconds if seconds else None
    return StageFigures(
        steps=int(record.step[here].max(initial=0)),
        num_steps=num_steps,
        tokens=float(np.nansum(tokens[here])),
        samples=float(np.nansum(record.column("samples")[here])),
        step_s=float(np.nanmedian(took)) if len(took) else None,
        tokens_per_s=tokens_per_s,
        of_peak=_of_peak(begins[-1], tokens_per_s) if begins and tokens_per_s else None,
    )


def _is_before_step(event: Tree, place: int, here: NDArray[np.bool_]) -> bool:
    return event["kind"] == "stage_begin" and place < len(here)


def _of_peak(begin: Tree, tokens_per_s: float) -> float | None:
    """Model FLOPs utilisation, with what a stage's begin says of model and devices."""
    per_token, peak = begin.get("flops_per_token"), begin.get("peak_flops")
    if not per_token or not peak:
        return None
    return float(tokens_per_s * per_token / (peak * begin.get("num_workers", 1)))


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
