"""What the workers of a stage send each other in a step: every collective, as DeepSpeed makes it.

Read off DeepSpeed 0.19.8, and held against bytes that really went over a link (tests/train/test_traffic.py):
- ZeRO-1 and 2 reduce gradients by all-reduce, not by reduce-scatter, unless `use_multi_rank_bucket_allreduce` is
  false (stage_1_and_2.py, average_tensor): twice what the paper counts. Then they gather the updated weights.
- ZeRO-3 reduces by reduce-scatter (stage3.py, __avg_scatter_grads). It gathers weights for the forward, and again
  for the backward what was let go in between: nothing, where the model has fewer elements than
  `stage3_max_reuse_distance`. Small parameters stay, and are gathered once, after the update.
- With hpZ the first gather after an update goes over all workers, the others stay in a group.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal

from launcher.plan import live
from launcher.plan.ds_memory import Sharding
from launcher.plan.plan import StagePlan
from launcher.plan.shapes import Shapes

Kind = Literal["all_gather", "reduce_scatter", "all_reduce", "reduce"]
Phase = Literal["forward", "backward", "update"]
SMALL_CALLS = 3
"""All-reduces of a few numbers in each step: loss and norm (train/engine.py), DeepSpeed's own norm, overflow."""
GLOO_SEGMENT = 1 << 20
"""Bytes of an all-reduce that gloo sends at a time."""
_FALLBACK_BUCKET = 500_000_000
"""Elements that DeepSpeed reduces at once without ZeRO (engine.py, buffered_allreduce_fallback)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """Collectives of one kind in one phase of a step.

    Attributes:
        bytes: of the whole tensors, over all calls of the step.
        calls: how many collectives, one after another.
        ranks: of a group; neighbours.
        is_last: whether they come with the last micro-batch alone.
        is_ahead: whether several are under way at a time, or run beside the arithmetic.
    """

    what: str
    kind: Kind
    phase: Phase
    bytes: float
    calls: int
    ranks: int
    is_last: bool = False
    is_ahead: bool = False

    def sent(self, device: str) -> float:
        """Return the bytes that each rank sends, in a ring: an all-reduce sends all twice."""
        times = 2 if self.is_whole(device) else 1
        return times * self.bytes * (self.ranks - 1) / self.ranks

    def hops(self, device: str) -> int:
        """Return the messages of one call that wait for one another.

        gloo lets a rank say that it is ready before another sends to it, which shows in its all-gather; and it
        sends no more than a segment of an all-reduce at a time (gloo/allreduce.cc).
        """
        steps = self.ranks - 1
        if not self.is_whole(device):
            return steps + (device == "cpu")
        part = self.bytes / max(1, self.calls) / self.ranks
        return 2 * steps * (max(1, ceil(part / GLOO_SEGMENT)) if device == "cpu" else 1)

    def is_whole(self, device: str) -> bool:
        """Whether every rank gets all of the sum, though perhaps it keeps a part."""
        # torch's gloo has no reduce-scatter of its own: it makes an all-reduce. Its reduce sends about as much.
        return self.kind == "all_reduce" or device == "cpu" and self.kind != "all_gather"


def of_step(shapes: Shapes, s: Sharding, plan: StagePlan) -> tuple[Exchange, ...]:
    """Return all exchanges of a step; none where there is one worker.

    Args:
        shapes: of the stage's model.
        s: the ds config's settings.
        plan: of the stage.
    """
    if plan.num_workers == 1:
        return ()
    make = {0: _stage_0, 1: _stage_1_and_2, 2: _stage_1_and_2, 3: _stage_3}[s.stage]
    told = _exchange(plan, "loss, norm", "all_reduce", "update", 8 * SMALL_CALLS, SMALL_CALLS)
    return (*(each for each in make(shapes, s, plan) if each.bytes > 0), told)


def sent_bytes(exchanges: Sequence[Exchange], device: str) -> int:
    """Return the bytes that each worker sends in a step, to all others."""
    return round(sum(each.sent(device) for each in exchanges))


def _stage_0(shapes: Shapes, s: Sharding, plan: StagePlan) -> tuple[Exchange, ...]:
    trained = shapes.num_trained
    calls = ceil(trained / _FALLBACK_BUCKET)
    return (_exchange(plan, "gradients", "all_reduce", "update", s.sent_bytes * trained, calls),)


def _stage_1_and_2(shapes: Shapes, s: Sharding, plan: StagePlan) -> tuple[Exchange, ...]:
    trained, rounds = shapes.num_trained, plan.accumulation if s.stage == 2 else 1
    # DeepSpeed reduces slices for each owner apart, or whole buckets for all.
    kind: Kind = "all_reduce" if s.reduces_whole else "reduce"
    calls = _buckets(_backward(shapes), s.reduce_bucket) + (0 if s.reduces_whole else plan.num_workers - 1)
    groups = len({each.group for each in shapes.parameters if each.group is not None})
    return (
        _exchange(
            plan,
            "gradients",
            kind,
            "backward",
            rounds * s.sent_bytes * trained,
            rounds * calls,
            is_last=s.stage == 1,
        ),
        _exchange(plan, "updated weights", "all_gather", "update", s.bytes * trained, groups),
    )


def _stage_3(shapes: Shapes, s: Sharding, plan: StagePlan) -> tuple[Exchange, ...]:
    rounds, inside = plan.accumulation, min(s.hpz, plan.num_workers)
    whole = live.whole(
        [each.numel for each in shapes.parameters],
        shapes.visits,
        persistence=s.persistence,
        max_reuse=s.max_reuse,
        prefetch=s.prefetch,
        max_live=s.max_live,
        backward=_recomputed(shapes) if plan.recomputes else (),
    )
    far = 1 if inside > 1 else rounds
    gradients: Kind = "reduce_scatter" if s.reduces_parts else "all_reduce"
    (ahead, ahead_calls), (again, again_calls) = whole.forward, whole.backward

    def gather(what: str, phase: Phase, elements: int, calls: int, times: int, ranks: int) -> Exchange:
        return _exchange(
            plan,
            what,
            "all_gather",
            phase,
            times * s.bytes * elements,
            times * calls,
            ranks=ranks,
            is_ahead=phase == "update" or s.prefetch > 0,
        )

    workers = plan.num_workers
    return (
        gather("weights", "forward", ahead, ahead_calls, far, workers),
        gather("weights in a group", "forward", ahead, ahead_calls, rounds - far, inside),
        gather("weights again", "backward", again, again_calls, rounds, inside if inside > 1 else workers),
        _exchange(
            plan,
            "gradients",
            gradients,
            "backward",
            rounds * s.sent_bytes * shapes.num_trained,
            rounds * _buckets(_backward(shapes), s.reduce_bucket),
        ),
        # Each has a call of its own (partition_parameters.py, _allgather_params_coalesced).
        gather("small weights", "update", whole.always, _num_small(shapes, s), 1, workers),
    )


def _recomputed(shapes: Shapes) -> list[tuple[int, ...]]:
    """The visits of a backward that runs each layer forward again first."""
    pieces: list[tuple[str, list[tuple[int, ...]]]] = []
    for visit in shapes.visits:
        # Of a stage's models the names begin with the model's number. Modules without parameters are of the piece
        # that they stand in.
        name = shapes.parameters[visit[0]].name if visit else ""
        found = re.match(r"(.*?\.\d+)\.", re.sub(r"^models\.\d+\.", "", name))
        layer = found[1] if found else ""
        if visit and (not pieces or pieces[-1][0] != layer):
            pieces.append((layer, []))
        if pieces:
            pieces[-1][1].append(visit)
    return [
        each for layer, piece in reversed(pieces) for each in (*(piece if layer else ()), *reversed(piece))
    ]


def _num_small(shapes: Shapes, s: Sharding) -> int:
    return sum(each.numel <= s.persistence for each in shapes.parameters)


def _exchange(
    plan: StagePlan,
    what: str,
    kind: Kind,
    phase: Phase,
    num_bytes: float,
    calls: int,
    *,
    ranks: int = 0,
    is_last: bool = False,
    is_ahead: bool = False,
) -> Exchange:
    return Exchange(
        what=what,
        kind=kind,
        phase=phase,
        bytes=num_bytes,
        calls=calls,
        ranks=ranks or plan.num_workers,
        is_last=is_last,
        is_ahead=is_ahead,
    )


def _backward(shapes: Shapes) -> list[int]:
    """Elements of the gradients in the order in which they come."""
    order = [i for visit in reversed(shapes.visits) for i in reversed(visit)]
    # What is used twice has its gradient when it is used first; what no module has of its own comes last.
    order = [*reversed(dict.fromkeys(reversed(order))), *range(len(shapes.parameters))]
    found = [shapes.parameters[i] for i in dict.fromkeys(order)]
    return [each.numel for each in found if each.group is not None]


def _buckets(numels: Sequence[int], size: int) -> int:
    """How often a bucket of so many elements is full, or ends."""
    calls, held = 1, 0
    for numel in numels:
        if held and held + numel > size:
            calls, held = calls + 1, 0
        held += numel
    return calls
