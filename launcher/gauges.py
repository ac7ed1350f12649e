"""The run in the cluster's own metrics: the driver's agent shows them to Prometheus, as `ray_launcher_…`."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.util import metrics

from launcher.report.figures import METRICS, Figure, Figures
from launcher.report.reading import Reading
from launcher.trackers import run_name

EVERY_S = 5.0


@contextmanager
def shown(run_dir: Path) -> Iterator[None]:
    """Show what the run writes into its record from now on, until the block ends.

    From the driver, since it lives as long as the run: a worker's series would end with each failure. A thread reads
    the record, so no step waits for it. Where no agent takes the metrics, nothing is done.

    Args:
        run_dir: of the run.
    """
    if not _has_agent():
        yield
        return
    ended = threading.Event()
    reading = Reading(run_dir / "metrics.jsonl")
    reading.go_to_end()
    arguments = (run_name(run_dir), reading, ended)
    threading.Thread(target=_show, args=arguments, daemon=True, name="gauges").start()
    try:
        yield
    finally:
        ended.set()


def _has_agent() -> bool:
    try:
        here = ray.get_runtime_context().get_node_id()
        return any(node["NodeID"] == here and node.get("MetricsExportPort") for node in ray.nodes())
    except Exception as error:  # What only shows a run must never end it.
        logging.getLogger(__name__).warning("the run is not shown to Prometheus: %s", error)
        return False


def _show(run: str, reading: Reading, ended: threading.Event) -> None:
    figures, board = Figures(), _Board(run)
    try:
        is_last = False
        while not is_last:
            is_last = ended.wait(EVERY_S)
            while events := reading.take():
                for event in events:
                    figures.take(event)
            for figure in figures.read(time.time()):
                board.show(figure)
    except Exception:  # What only shows a run must never end it.
        logging.getLogger(__name__).warning("the run is not shown to Prometheus any more", exc_info=True)


class _Board:
    """The metrics, made as Ray wants them: once for a process."""

    made: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, run: str) -> None:
        self.run = run
        for name, (kind, told) in METRICS.items():
            if name not in self.made:
                make = metrics.Gauge if kind == "gauge" else metrics.Counter
                self.made[name] = make(name, told, tag_keys=_keys(name))

    def show(self, figure: Figure) -> None:
        """Set a gauge, or add to a counter."""
        values = (self.run, figure.stage, figure.metric)
        tags = dict(zip(_keys(figure.name), values, strict=False))
        metric = self.made[figure.name]
        if METRICS[figure.name][0] == "gauge":
            metric.set(figure.value, tags)
        elif figure.value > 0:
            metric.inc(figure.value, tags)


def _keys(name: str) -> tuple[str, ...]:
    return ("run", "stage", "metric") if name == "launcher_eval" else ("run", "stage")
