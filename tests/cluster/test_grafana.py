"""The Grafana dashboard against what a run really exports: every name, every label, from a live endpoint."""

import contextlib
import os
import signal
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launcher.report.figures import METRICS
from tests import heads
from tests.cluster.dashboard import NEEDS_A_GPU, Sample, dashboard, metric_names, queries, samples, unanswered
from tests.conftest import free_port, write_jsonl
from tests.runs import Run, chat_recipe, environment


def test_every_metric_of_a_run_is_on_the_dashboard() -> None:
    shown = set().union(*(metric_names(query) for query in queries()))
    counters = {name for name, (kind, _) in METRICS.items() if kind == "counter"}
    ours = {f"ray_{name}{'_total' if name in counters else ''}" for name in METRICS}
    assert {name for name in shown if "launcher" in name} == ours


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    found = dashboard()
    assert found["uid"] and found["schemaVersion"] >= 36
    assert {each["name"] for each in found["templating"]["list"]} == {"datasource", "run", "window"}
    panels = found["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        if panel["type"] != "row":
            assert panel["description"] and panel["datasource"]["uid"] == "${datasource}", panel["title"]
    places = [panel["gridPos"] for panel in panels]
    cells = {
        (x, y)
        for at in places
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    }
    assert len(cells) == sum(at["w"] * at["h"] for at in places), "no panel lies on another"
    assert max(x for x, _ in cells) < 24


def test_a_wrong_name_or_label_is_found() -> None:
    there = [Sample("ray_launcher_loss", {"run": "it", "stage": "chat"})]
    loss = next(query for query in queries() if query.panel == "Loss")
    assert unanswered(loss, there) == []
    assert unanswered(loss, [Sample("ray_launcher_los", there[0].labels)])
    assert unanswered(loss, [Sample("ray_launcher_loss", {"run": "it"})]) == [
        "Loss: ray_launcher_loss has no label stage"
    ]


@dataclass(frozen=True, slots=True)
class Head:
    """A cluster of one node, its own metrics among what it shows."""

    address: str
    metrics_port: int
    env: dict[str, str]

    def scraped(self) -> str:
        """Return what Prometheus would get; nothing while the agent begins."""
        with contextlib.suppress(OSError):
            url = f"http://127.0.0.1:{self.metrics_port}/metrics"
            with urllib.request.urlopen(url, timeout=10) as answer:
                return answer.read().decode()
        return ""


@contextmanager
def started_head() -> Iterator[Head]:
    """Yield a head as `ray start` makes it, with its page and its agent."""
    folder, port, metrics_port = Path(tempfile.mkdtemp(prefix="ray-")), free_port(), free_port()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    variables = environment(RAY_AUTH_MODE="disabled", RAY_TMPDIR=str(folder), PATH=path)
    options = [f"--port={port}", f"--dashboard-port={free_port()}", f"--metrics-export-port={metrics_port}"]
    head = Head(f"127.0.0.1:{port}", metrics_port, variables)
    with heads.running(folder, options, variables, head.scraped, 0.5):
        yield head


def long_run(head: Head, setup: dict[str, Any], folder: Path) -> Run:
    """Return a run on the cluster that evaluates and saves every 20 steps, until somebody stops it."""
    few = write_jsonl(folder / "eval.jsonl", [])
    few.write_text("".join(setup["train"].read_text(encoding="utf-8").splitlines(keepends=True)[:8]))
    data = {"train": str(setup["train"]), "eval": str(few)}
    recipe = chat_recipe(setup, folder / "chat.yaml", steps=5000, data=data, eval_every=20)
    options = ["--workers", "2", "--set", "checkpoint.every_steps=20", "--set", "spares=false"]
    return Run(recipe, folder / "runs", *options, "--address", head.address, **head.env)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_every_query_finds_what_a_run_exports(chat_setup: dict[str, Any], tmp_path: Path) -> None:
    asked = [query for query in queries() if not metric_names(query) & NEEDS_A_GPU]
    assert {name for query in queries() for name in metric_names(query) & NEEDS_A_GPU} == NEEDS_A_GPU
    with started_head() as head:
        run = long_run(head, chat_setup, tmp_path).start()
        run.wait_until(lambda: len(run.events("checkpoint")) > 1, "two checkpoints")
        found: list[list[str]] = [["nothing yet"]]

        def all_is_there() -> bool:
            there = samples(head.scraped())
            found[0] = [wrong for query in asked for wrong in unanswered(query, there)]
            return not found[0]

        try:
            run.wait_until(all_is_there, "answer to every query", 60)
        except AssertionError as error:
            raise AssertionError(f"{found[0]}") from error
        # Ray's agent forgets gauges that are set once, after 20 s: all have to be there for as long as the run is.
        begun_s = run.events("stage_begin")[-1]["time"]
        run.wait_until(lambda: time.time() > begun_s + 45, "45 s")
        assert all_is_there(), found[0]
        of_run = [one for one in samples(head.scraped()) if one.name.startswith("ray_launcher_")]
        assert {one.labels["run"] for one in of_run} == {"it"} and {
            one.labels["stage"] for one in of_run
        } == {"chat"}
        assert {one.labels["metric"] for one in of_run if one.name == "ray_launcher_eval"} >= {"loss"}
        run.send(signal.SIGINT)
        assert run.end(60) == 130, run.output()
