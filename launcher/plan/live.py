"""Which parameters are whole at a time under ZeRO-3, as DeepSpeed's coordinator fetches and releases them.

Followed as in deepspeed/runtime/zero/partitioned_param_coordinator.py: `_fetch_sub_module_impl`,
`release_sub_module`, `__params_to_release`.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Whole:
    """Elements that are whole on every worker.

    Attributes:
        always: of parameters that are never let go.
        at_turn: of the others, when the forward has ended.
        most: of the others, at most.
        forward, backward: of the others, how many are gathered in each, and by how many calls.
    """

    always: int
    at_turn: int
    most: int
    forward: tuple[int, int] = field(default=(0, 0), compare=False)
    backward: tuple[int, int] = field(default=(0, 0), compare=False)


def whole(
    numels: Sequence[int],
    visits: Sequence[tuple[int, ...]],
    *,
    persistence: int,
    max_reuse: int,
    prefetch: int,
    max_live: int,
    backward: Sequence[tuple[int, ...]] = (),
) -> Whole:
    """Follow one forward and backward.

    Each module fetches its own parameters and, beyond them, those to come: up to `prefetch` elements, but at
    least one parameter, whatever its size. Modules without parameters do so too. So fetching runs ahead of the
    work, up to `max_live`; and what the look ahead has passed over is not let go before it is used there.

    Args:
        numels: elements of each parameter.
        visits: for each module run in a forward, its own parameters; the backward visits them in reverse.
        persistence: parameters no larger than this stay.
        max_reuse: parameters stay that are used again within so many elements.
        prefetch, max_live: of the ds config, in elements.
        backward: the visits of the backward; by default those of the forward in reverse.
    """
    order = [*visits, *(backward or reversed(visits))]
    walk = _Walk(numels, order, persistence)
    at_turn, most, forward = 0, 0, (0, 0)
    for step, visit in enumerate(order):
        walk.fetch(step, visit)
        walk.look_ahead(prefetch, max_live)
        most = max(most, walk.elements)
        walk.release(step, visit, max_reuse)
        if step == len(visits) - 1:
            at_turn, forward = walk.elements, (walk.gathered, walk.calls)
    again = (walk.gathered - forward[0], walk.calls - forward[1])
    return Whole(sum(n for n in numels if n <= persistence), at_turn, most, forward, again)


@dataclass(slots=True)
class _Walk:
    """What is whole, what is to be fetched, and up to which step each parameter was fetched for."""

    numels: Sequence[int]
    order: Sequence[tuple[int, ...]]
    persistence: int
    elements: int = 0
    gathered: int = 0
    calls: int = 0
    there: set[int] = field(default_factory=set)
    fetched_for: dict[int, int] = field(default_factory=dict)
    queue: deque[tuple[int, int]] = field(default_factory=deque)
    uses: dict[int, deque[int]] = field(default_factory=dict)
    before: list[int] = field(default_factory=lambda: [0])

    def __post_init__(self) -> None:
        """Line up all uses."""
        for step, visit in enumerate(self.order):
            self.before.append(self.before[-1] + sum(self.numels[i] for i in visit))
            for i in visit:
                self.queue.append((i, step))
                self.uses.setdefault(i, deque()).append(step)

    def fetch(self, step: int, visit: tuple[int, ...]) -> None:
        """Make a module's own parameters whole, and take them off the queue."""
        missing = {i for i in visit if self.fetched_for.get(i, -1) < step}
        before = self.gathered
        for i in visit:
            self._gather(i)
        self.calls += self.gathered > before
        while missing and self.queue:
            i, used_at = self.queue.popleft()
            self.fetched_for[i] = used_at
            missing.discard(i)

    def look_ahead(self, prefetch: int, max_live: int) -> None:
        """Make the next ones whole."""
        room, fetched = min(max_live - self.elements, prefetch), 0
        while self.queue and fetched < room:
            i, used_at = self.queue.popleft()
            self.fetched_for[i] = max(self.fetched_for.get(i, -1), used_at)
            fetched += self._gather(i)
        self.calls += fetched > 0

    def release(self, step: int, visit: tuple[int, ...], max_reuse: int) -> None:
        """Let a module's own parameters go, unless they are wanted again soon."""
        for i in visit:
            uses = self.uses[i]
            while uses and uses[0] <= step:
                uses.popleft()
            is_soon = bool(uses) and self.before[uses[0]] - self.before[step + 1] < max_reuse
            if i in self.there and not is_soon and self.fetched_for.get(i, -1) <= step:
                self.there.discard(i)
                self.elements -= self.numels[i]

    def _gather(self, i: int) -> int:
        if i in self.there or self.numels[i] <= self.persistence:
            return 0
        self.there.add(i)
        self.elements += self.numels[i]
        self.gathered += self.numels[i]
        return self.numels[i]
