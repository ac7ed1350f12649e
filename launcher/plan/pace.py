"""How long a step takes: its arithmetic, its exchanges over the links there are, and which of them run beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log2
from typing import Literal

from launcher.plan.cluster import Cluster
from launcher.plan.ds_memory import Sharding
from launcher.plan.traffic import Exchange, Phase

GLOO_HOP_S = 1e-4
"""Of a message of gloo's between two processes, about, where the network adds nothing."""
GLOO_THREADS = 2
NCCL_CALL_S, NCCL_INSIDE_S, NCCL_BETWEEN_S = 8.4e-6, 3.4e-6, 9.6e-6
"""Of a call, of a hop over NVLink, of one between nodes: NCCL's own numbers (src/graph/tuning.cc; ring, Simple)."""
TREE_INSIDE_S, TREE_BETWEEN_S, TREE_SHARE = 28e-6, 50e-6, 0.9
"""The same of its trees, and their part of the ring's speed; it takes them for all-reduce where they are quicker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """A step's seconds.

    Attributes:
        work_s: of arithmetic, and of what offloading adds.
        bandwidth_s: of all exchanges, were messages instant.
        latency_s: of all exchanges, were links endless.
        step_s: of the step: exchanges that run beside the arithmetic count only as far as they are longer.
    """

    work_s: float
    bandwidth_s: float
    latency_s: float
    step_s: float

    @property
    def waits_s(self) -> float:
        """Seconds in which a worker does nothing but wait for others' data."""
        return self.step_s - self.work_s

    @property
    def limit(self) -> Literal["work", "bandwidth", "latency"]:
        """What most of the step goes to."""
        if self.waits_s < self.work_s:
            return "work"
        return "bandwidth" if self.bandwidth_s >= self.latency_s else "latency"


def of_step(
    exchanges: Sequence[Exchange],
    s: Sharding,
    cluster: Cluster,
    *,
    work_s: float,
    forward_share: float = 1 / 3,
    rounds: int = 1,
    offload_s: float = 0.0,
) -> Pace:
    """Return the pace of a step.

    On GPUs weights are gathered beside the arithmetic, and gradients are reduced beside the backward where
    `overlap_comm` says so; of each the first or last call has nothing to hide behind. On CPUs a reduction is
    waited for, whatever the ds config says, since there are no streams.

    Args:
        exchanges: of `traffic.of_step`.
        s: the ds config's settings.
        cluster: the machines.
        work_s: of the arithmetic, of all micro-batches.
        forward_share: the forward's part of it; a quarter where activations are computed again.
        rounds: micro-batches of the step.
        offload_s: what moving to the host and updating there adds.
    """
    taken = [(each, *seconds(each, cluster)) for each in exchanges]
    forward_s, backward_s = forward_share * work_s, (1 - forward_share) * work_s
    total = offload_s + _beside(forward_s, _of(taken, "forward", gathers=True))
    gathers, reductions = (_of(taken, "backward", gathers=each) for each in (True, False))
    gathered = _beside(backward_s, gathers)
    if cluster.device == "cuda" and s.overlap_comm:
        window_s = gathered / rounds if any(each.is_last for each in exchanges) else gathered
        # What is gathered and what is reduced use the same links.
        total += max(gathered - window_s + _beside(window_s, reductions), gathers.all_s + reductions.all_s)
    else:
        total += gathered + reductions.all_s
    total += sum(_of(taken, "update", gathers=each).all_s for each in (True, False))
    return Pace(
        work_s=work_s + offload_s,
        bandwidth_s=sum(sent_s for _, sent_s, _ in taken),
        latency_s=sum(waits_s for *_, waits_s in taken),
        step_s=total,
    )


@dataclass(frozen=True, slots=True)
class _Calls:
    """Seconds of some calls, of one of them, and whether they are begun ahead of their use."""

    all_s: float
    one_s: float
    is_ahead: bool


def _of(taken: Sequence[tuple[Exchange, float, float]], phase: Phase, *, gathers: bool) -> _Calls:
    """The gathers or the reductions of a phase."""
    found = [
        (each, sent_s + waits_s)
        for each, sent_s, waits_s in taken
        if each.phase == phase and gathers == (each.kind == "all_gather")
    ]
    return _Calls(
        sum(all_s for _, all_s in found),
        max((all_s / max(1, each.calls) for each, all_s in found), default=0.0),
        all(each.is_ahead or each.kind != "all_gather" for each, _ in found),
    )


def _beside(work_s: float, calls: _Calls) -> float:
    """Seconds of arithmetic and of calls that run beside it, if they do; one has nothing to hide behind."""
    return max(work_s + calls.one_s, calls.all_s) if calls.is_ahead else work_s + calls.all_s


def seconds(exchange: Exchange, cluster: Cluster) -> tuple[float, float]:
    """Return the seconds of all calls of an exchange: for the bytes, and for the messages that wait for one another.

    A ring visits the nodes one after another, so that what all ranks pass on leaves each node once: its links
    to other nodes carry as much together as each link inside it. NCCL makes a ring for each network card.
    """
    hops = exchange.hops(cluster.device)
    spans = min(cluster.num_nodes, ceil(exchange.ranks / cluster.workers_per_node))
    link = cluster.accelerator.peer_bandwidth if cluster.accelerator else cluster.node_bandwidth
    if spans > 1:
        link = min(link, cluster.node_bandwidth)
    sent_s = exchange.sent(cluster.device) / link
    between = hops * (spans - 1) / max(1, exchange.ranks - 1)
    if cluster.device == "cpu":
        waits_s = exchange.calls * (hops * GLOO_HOP_S + between * cluster.latency_s)
        return _with_gloo(exchange, sent_s, waits_s, cluster.call_s)
    inside_s, between_s = NCCL_INSIDE_S, NCCL_BETWEEN_S + cluster.latency_s
    ring = sent_s, exchange.calls * (NCCL_CALL_S + (hops - between) * inside_s + between * between_s)
    if exchange.kind != "all_reduce" or spans == 1:
        return ring
    deep_s = (ceil(exchange.ranks / spans) - 1) * TREE_INSIDE_S
    deep_s += log2(spans) * (TREE_BETWEEN_S + cluster.latency_s)
    return min(ring, (sent_s / TREE_SHARE, exchange.calls * (NCCL_CALL_S + 2 * deep_s)), key=sum)


def _with_gloo(exchange: Exchange, sent_s: float, waits_s: float, call_s: float) -> tuple[float, float]:
    """Seconds as gloo makes an exchange, measured over throttled links."""
    if exchange.kind != "all_gather":
        return sent_s, waits_s + exchange.calls * call_s
    if exchange.is_ahead:
        # Its threads make two calls at a time.
        return sent_s, waits_s / GLOO_THREADS
    # A part goes in two halves, and the word that a rank is ready waits behind the first: so rank after rank.
    return sent_s * (1 + 1 / (2 * (exchange.ranks - 1))), waits_s + exchange.calls * call_s
