"""How a run ended, as a table; and what happened in it, out of events."""

import errno
from typing import Any

import pytest

from launcher import errors, oom_kills
from launcher.report import history
from launcher.report.history import Life
from launcher.verdict import Cost, Facts, judge

FAILED = errors.TrainingFailed("workers failed more than 3 times (max_failures)")
# Ray says this of every process that is killed, whoever killed it.
KILLED = (
    "ActorDiedError: The actor died unexpectedly before finishing this task. There are some potential root causes."
    " (1) The process is killed by SIGKILL by OOM killer due to high memory usage. (2) ray stop --force is called."
)
MONITOR = (
    "ActorDiedError: Task was killed due to the node running low on memory. Memory on the node was 15.4GB"
)
OUT = {
    "host": "stage a ran out of host memory on rank 0",
    "GPU": "stage a ran out of GPU memory on rank 3",
}


@pytest.mark.parametrize(
    ("facts", "kind", "code", "words"),
    [
        ({"error": None}, "done", 0, ""),
        ({"error": errors.DataError("x.jsonl, row 3")}, "bad input", 2, "correct"),
        ({"error": errors.RunExists("it")}, "bad input", 2, "correct"),
        ({"error": errors.DoesNotFit("12 GB")}, "does not fit", 2, "--plan"),
        ({"error": errors.OutOfMemory(OUT["GPU"])}, "out of GPU memory", 7, "on_oom=shrink"),
        ({"error": errors.OutOfMemory(OUT["host"])}, "out of host memory", 7, "more memory"),
        ({"error": FAILED, "said": {0: KILLED}, "is_lost": True}, "worker lost", 4, "logs/rank-1.log"),
        (
            {"error": FAILED, "said": {0: KILLED}, "oom_kills": 2, "is_lost": True},
            "out of host memory",
            7,
            "more memory",
        ),
        ({"error": FAILED, "said": {1: MONITOR}, "is_lost": True}, "out of host memory", 7, "fewer workers"),
        ({"error": FAILED, "said": {1: "its node has died"}, "is_lost": True}, "node lost", 4, "--workers"),
        (
            {"error": FAILED, "said": {1: KILLED}, "nodes_gone": 1, "is_lost": True},
            "node lost",
            4,
            "node back",
        ),
        ({"error": FAILED, "said": {1: "the node was preempted"}, "is_lost": True}, "preempted", 4, "range"),
        ({"error": FAILED, "said": {0: "KeyError: 'x'"}}, "bug", 4, "report it"),
        # Whatever else went on meanwhile.
        (
            {"error": FAILED, "said": {0: "KeyError: 'x'"}, "oom_kills": 1, "nodes_gone": 1},
            "bug",
            4,
            "report it",
        ),
        ({"error": errors.ClusterError("no GPUs"), "is_preempted": True}, "preempted", 3, "range"),
        ({"error": errors.ClusterError("no GPUs"), "nodes_gone": 1}, "node lost", 3, "node back"),
        ({"error": errors.ClusterError("no GPUs")}, "cluster", 3, "bring nodes"),
        ({"error": errors.Hang("all stand still")}, "hang", 9, "network"),
        ({"error": errors.NumbersError("the loss is nan", "a", 3)}, "numbers", 8, "on_nan=skip"),
        ({"error": errors.StorageError("the disk is full")}, "storage", 6, "free space"),
        ({"error": OSError(errno.ENOSPC, "No space left on device")}, "storage", 6, "free space"),
        ({"error": errors.ExportFailed("other logits")}, "export", 5, "checkpoint is kept"),
        (
            {"error": KeyboardInterrupt()},
            "stopped by the user",
            130,
            "the same command continues from step 5",
        ),
        ({"error": KeyError("x")}, "bug", 1, "report it"),
        ({"error": FileNotFoundError(2, "no such file")}, "bug", 1, "report it"),
    ],
)
def test_every_end_is_one_of_a_few(facts: dict[str, Any], kind: str, code: int, words: str) -> None:
    judged = judge(Facts(**facts, continues="from step 5 of stage a", log="logs/rank-1.log"))
    assert (judged.kind, judged.exit_code) == (kind, code)
    lines = judged.lines()
    assert lines[0].startswith(f"verdict: {kind} (exit code {code})")
    if kind != "done":
        assert words in lines[-1] and "the same command continues from step 5 of stage a" in lines[-1]


def test_the_lines_tell_what_was_seen_and_what_it_cost() -> None:
    cost = Cost(steps=7, seconds=30.4, restarts=2, restart_s=41.6, again=9)
    judged = judge(Facts(error=FAILED, is_lost=True, oom_kills=1, seen=("last step 12",), cost=cost))
    assert judged.lines()[1:-1] == [
        "  seen: last step 12",
        "  seen: the kernel killed 1 processes for want of memory",
        "  cost: 7 steps and 30.4 s since the last checkpoint; 2 restarts of the workers, 42 s, 9 steps trained again",
    ]
    done = judge(Facts(error=None, figures="20 steps, 60 s in this try", cost=Cost(restarts=1, restart_s=9)))
    assert done.lines() == [
        "verdict: done (exit code 0): 20 steps, 60 s in this try; 1 restarts of the workers, 9 s"
    ]


def _step(step: int, time_s: float) -> dict[str, Any]:
    return {"kind": "step", "stage": "a", "step": step, "time": time_s}


def _begin(start: int, time_s: float) -> dict[str, Any]:
    return {"kind": "stage_begin", "stage": "a", "start": start, "num_steps": 50, "time": time_s}


def test_what_restarts_and_resizes_cost() -> None:
    checkpoint = {"kind": "checkpoint", "stage": "a", "step": 5, "bytes": 9, "stall_s": 0.1, "time": 5.5}
    seen = {"kind": "seen", "said": {"1": "gone"}, "is_lost": True, "time": 8.5}
    failure = {"kind": "failure", "reason": "gone", "ranks": [1], "time": 9.0}
    worker = {"kind": "worker", "rank": 1, "host": "h", "time": 0.0}
    first = [
        worker | {"oom_kills": 1},
        _begin(0, 1.0),
        *(_step(n, float(n)) for n in range(1, 9)),
        checkpoint,
    ]
    first += [seen, failure, worker | {"oom_kills": 2}, _begin(5, 20.0), _step(6, 22.0)]
    second = [_begin(6, 40.0), _step(7, 41.0)]
    lives = [Life(2, 0.0, first, 25.0, 0, "preempted"), Life(3, 30.0, second, 50.0)]
    found = history.of(lives, [_step(7, 41.0), _step(8, 42.0)])
    assert (found.restarts, found.again) == (2, 3)
    # From step 8 at 8 s to step 6 at 22 s; from there to step 7 at 41 s.
    assert found.restart_s == (22 - 8) + (41 - 22)
    assert (found.step, found.saved) == (8, 6)
    kinds = [event["kind"] for event in found.events]
    assert kinds == ["start", "checkpoint", "failure", "restart", "resize", "restart"]
    assert found.said == {1: "gone"} and found.is_lost and found.hosts == {1: "h"}
    assert found.oom_kills == {"h": (1, 2)}


def test_the_kernel_s_counter_is_read_where_it_is(tmp_path: Any) -> None:
    (tmp_path / "events").write_text("low 0\noom 3\noom_kill 2\n")
    assert oom_kills.count((str(tmp_path / "none"), str(tmp_path / "events"))) == 2
    assert oom_kills.count((str(tmp_path / "none"),)) == 0
