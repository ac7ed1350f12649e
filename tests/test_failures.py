"""What is decided when workers fail, as a table."""

import pytest

from launcher.errors import DataError, Hang, NumbersError, OutOfMemory, TrainingFailed
from launcher.failures import MOST_ROLLBACKS, Halve, Policy, Retry, Rollback, Stop

LOST = RuntimeError("The actor died")


def policy(max_failures: int = 2, on_oom: str = "stop") -> Policy:
    return Policy(max_failures, on_oom, "runs/x/logs")  # type: ignore[arg-type]


def test_a_lost_worker_is_replaced_until_the_budget_is_spent() -> None:
    asked = policy(max_failures=2)
    assert asked.decide({1: LOST}, {1}) == Retry("The actor died")
    assert isinstance(asked.decide({0: LOST}, {0}), Retry)
    ended = asked.decide({0: LOST}, {0})
    assert isinstance(ended, Stop)
    assert "more than 2 times (max_failures)" in str(ended.error)


def test_an_error_with_a_remedy_ends_the_run_at_once() -> None:
    error = DataError("rows.jsonl, row 3: no text")
    assert policy().decide({0: error}, set()) == Stop(error)
    # Also where another rank died of it.
    assert policy().decide({0: LOST, 1: error}, {0}) == Stop(error)


def test_the_same_exception_twice_is_enough() -> None:
    asked = policy(max_failures=9)
    assert isinstance(asked.decide({0: ValueError("shape")}, set()), Retry)
    assert isinstance(asked.decide({0: ValueError("other")}, set()), Retry)
    ended = asked.decide({0: ValueError("other")}, set())
    assert isinstance(ended, Stop)
    assert isinstance(ended.error, TrainingFailed)
    assert "twice in the same way" in str(ended.error)


def test_an_exception_is_forgotten_when_a_worker_was_lost_in_between() -> None:
    asked = policy(max_failures=9)
    for failures, lost in (({0: ValueError("x")}, set()), ({0: LOST}, {0}), ({0: ValueError("x")}, set())):
        assert isinstance(asked.decide(failures, lost), Retry)


def test_a_broken_collective_means_that_a_peer_is_gone() -> None:
    asked = policy(max_failures=2)
    error = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1")
    assert isinstance(asked.decide({0: error}, set()), Retry)
    assert isinstance(asked.decide({0: error}, set()), Retry)
    assert isinstance(asked.decide({0: error}, set()), Stop)


@pytest.mark.parametrize(("on_oom", "can_halve"), [("stop", True), ("shrink", False)])
def test_out_of_memory_ends_a_run_that_cannot_or_may_not_shrink(on_oom: str, can_halve: bool) -> None:
    error = OutOfMemory("no memory", "target", can_halve)
    assert policy(on_oom=on_oom).decide({0: error}, set()) == Stop(error)


def test_out_of_memory_halves_without_a_budget_and_whatever_the_other_ranks_say() -> None:
    asked = policy(max_failures=0, on_oom="shrink")
    error = OutOfMemory("no memory", "target", True)
    for _ in range(5):
        assert asked.decide({0: RuntimeError("gloo: closed"), 1: error}, set()) == Halve(
            "target", "no memory"
        )


def test_hangs_have_a_budget_of_their_own_which_a_new_step_fills_up() -> None:
    asked = policy(max_failures=3)
    for step in (7, 7, 5):  # Steps made again since the checkpoint are not new.
        assert asked.hung("rank 1 is behind", "target", step) == Retry("rank 1 is behind")
    assert isinstance(asked.hung("rank 1 is behind", "target", 8), Retry)
    for step in (8, 3):
        assert isinstance(asked.hung("rank 1 is behind", "target", step), Retry)
    ended = asked.hung("rank 1 on HOST is behind (stacks: FILE)", "target", 8)
    assert isinstance(ended, Stop)
    assert isinstance(ended.error, Hang)
    assert ended.error.exit_code == 9
    assert str(ended.error).startswith(
        "the workers hung 4 times without a new step (max_failures: 3): rank 1 on HOST is behind (stacks: FILE). "
    )
    assert asked.num_failures == 0
    assert isinstance(asked.hung("again", "next", 1), Retry)
    assert isinstance(policy(max_failures=0).hung("told", "target", 8), Stop)


def test_bad_numbers_roll_back_where_asked_and_not_for_ever() -> None:
    error = NumbersError("the loss is nan", "chat", 7)
    assert policy().decide({0: error, 1: error}, set()) == Stop(error)
    asked = Policy(2, "stop", "runs/x/logs", "rollback")
    for _ in range(MOST_ROLLBACKS):
        assert asked.decide({0: error, 1: error}, set()) == Rollback("chat", 7, "the loss is nan")
    assert asked.decide({0: error, 1: error}, set()) == Stop(error)
