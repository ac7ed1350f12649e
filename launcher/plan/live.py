"""Which parameters are whole at a time under ZeRO-3, as DeepSpeed's coordinator fetches and releases them."""

from collections.abc import Sequence


def most_whole(
    numels: Sequence[int],
    visits: Sequence[tuple[int, ...]],
    *,
    persistence: int,
    max_reuse: int,
    prefetch: int,
) -> tuple[int, int]:
    """Return the elements that are always whole, and the most that are whole besides.

    After a module has run, its parameters are let go unless a module within the next `max_reuse` elements
    needs one of them again; those to come are fetched up to `prefetch` elements ahead; what is no larger
    than `persistence` stays (deepspeed/runtime/zero/partitioned_param_coordinator.py,
    `fetch_sub_module` and `__params_to_release`).

    Args:
        numels: elements of each parameter.
        visits: for each module run in a forward, its own parameters; the backward visits them in reverse.
        persistence, max_reuse, prefetch: of the ds config, in elements.
    """
    always = sum(numel for numel in numels if numel <= persistence)
    order = [*visits, *reversed(visits)]
    sizes = [sum(numels[i] for i in visit) for visit in order]
    before = [0]
    for size in sizes:
        before.append(before[-1] + size)
    changes = [0] * (len(order) + 1)
    for i, uses in _uses(order).items():
        if numels[i] <= persistence:
            continue
        for at, following in zip(uses, [*uses[1:], None], strict=True):
            # Kept from this use to the next, or let go right after it.
            is_kept = following is not None and before[following] - before[at + 1] < max_reuse
            changes[at] += numels[i]
            changes[following if is_kept and following is not None else at + 1] -= numels[i]
    whole, most = 0, 0
    for at, change in enumerate(changes[:-1]):
        whole += change
        ahead = _ahead(order, at, numels, prefetch, persistence) if whole < before[-1] // 2 - always else 0
        most = max(most, min(whole + ahead, sum(numels) - always))
    return always, most


def _uses(order: Sequence[tuple[int, ...]]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for at, visit in enumerate(order):
        for i in visit:
            found.setdefault(i, []).append(at)
    return found


def _ahead(
    order: Sequence[tuple[int, ...]], at: int, numels: Sequence[int], prefetch: int, persistence: int
) -> int:
    """Elements fetched ahead: the next parameters, until they exceed the limit."""
    total = 0
    for visit in order[at + 1 :]:
        for i in visit:
            if total >= prefetch:
                return total
            total += numels[i] if numels[i] > persistence else 0
    return total
