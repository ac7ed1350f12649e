"""What a real run waited for data, and what it spent on padding: from its own records."""

import json
from pathlib import Path

from benchmarks.data_engine.measure import Figure, at_most

METRICS = "metrics.jsonl"
MOST_WAIT = 0.01
# The first steps open files and warm caches.
FIRST_STEP = 3


def wait(run: Path) -> list[Figure]:
    """Answer: which share of a run's steps went into waiting for data, and which of its slots were padding."""
    records = [json.loads(line) for line in (run / METRICS).read_text(encoding="utf-8").splitlines()]
    stages: dict[str, list[dict[str, float]]] = {}
    for record in records:
        if record["kind"] == "step" and record["step"] >= FIRST_STEP:
            stages.setdefault(str(record["stage"]), []).append(record)
    figures = []
    for stage, steps in stages.items():
        total = {key: sum(step[key] for step in steps) for key in ("step_s", "data_s", "tokens", "slots")}
        figures += [
            at_most(f"{stage}: share of waiting for data", total["data_s"] / total["step_s"], "", MOST_WAIT),
            Figure(name=f"{stage}: padding", value=1 - total["tokens"] / total["slots"], unit="of the slots"),
            Figure(name=f"{stage}: steps", value=len(steps), unit=""),
        ]
    return figures
