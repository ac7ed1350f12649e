"""Workers that come and go with the nodes, on a real cluster of several raylets."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.runs import Run, add_raylet, chat_recipe, own_cluster

pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def machines() -> Iterator[Any]:
    """A cluster of a head with one CPU; nodes are added by the tests."""
    with own_cluster() as cluster:
        add_raylet(cluster, 1)
        yield cluster


def seconds_to_the_next_step(run: Run, num_workers: int) -> float:
    """Wait for a step that so many workers make; return how long it took."""
    started_s = time.time()

    def is_there() -> bool:
        begun = [
            e for e in run.events("stage_begin") if e["num_workers"] == num_workers and e["time"] > started_s
        ]
        return bool(begun) and run.events("step")[-1]["time"] > begun[-1]["time"]

    run.wait_until(is_there, f"step by {num_workers} workers")
    return time.time() - started_s


@pytest.mark.slow
def test_a_run_shrinks_and_grows_with_its_nodes(
    machines: Any, chat_setup: dict[str, Any], tmp_path: Path
) -> None:
    recipe = chat_recipe(chat_setup, tmp_path / "chat.yaml", steps=4000)
    node = add_raylet(machines, 1)
    settings = ["--set", "checkpoint.every_steps=20", "--set", "log_samples=true"]
    run = Run(recipe, tmp_path / "runs", "--workers", "1:2", "--address", machines.address, *settings)
    run.start().wait_for_step(30)
    assert run.events("stage_begin")[-1]["num_workers"] == 2
    # As a spot node goes that gives no notice.
    machines.remove_node(node, allow_graceful=False)
    shrunk_s = seconds_to_the_next_step(run, 1)
    node = add_raylet(machines, 1)
    grown_s = seconds_to_the_next_step(run, 2)
    print(f"next step after a node went {shrunk_s:.1f} s, after one came {grown_s:.1f} s")
    # Growing loses no step: the workers had saved before they left.
    begun = run.events("stage_begin")
    grown = next(e for e in begun[2:] if e["num_workers"] == 2)
    before = [e["step"] for e in run.events("step") if e["time"] < grown["time"]][-1]
    assert grown["start"] == before
    # Notice of a node's end: saved, and on with the other.
    drain(machines, node)
    seconds_to_the_next_step(run, 1)
    begun = run.events("stage_begin")
    before = [e["step"] for e in run.events("step") if e["time"] < begun[-1]["time"]][-1]
    assert begun[-1]["start"] == before
    assert "will soon go" in run.output()
    run.send(signal.SIGTERM)
    assert run.end(60) == 130, run.output()
    lone = Run(recipe, tmp_path / "lone", "--workers", "2", "--set", "stages.chat.steps=4000")
    last = min(run.last_step(), 200)
    lone.start().wait_for_step(last)
    lone.send(signal.SIGTERM)
    assert lone.end(60) == 130
    disturbed, wanted = run.losses(), lone.losses()
    largest = max(abs(disturbed[i] - wanted[i]) / wanted[i] for i in range(1, last + 1))
    print(f"{last} steps, largest relative difference of losses {largest:.1e}")
    assert largest < 1e-3


def drain(cluster: Any, node: Any) -> None:
    """Announce a node's end, as a cloud does before it takes a spot machine."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    client = GcsClient(address=cluster.address)
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    client.drain_node(node.node_id, reason, "a spot machine is taken", int(time.time() * 1000) + 60_000)
