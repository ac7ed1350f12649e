"""Samples to batches, by their lengths: packs, steps of like length, micro-batches. Pure.

The samples of a step never depend on the number of workers; only who runs which does. Chunk c of a step
is run by rank c % num_workers as its micro-batch c // num_workers, so the chunks that ranks run at the
same time are neighbours in length, and none waits for another's padding.
"""

import itertools
from collections import defaultdict

import numpy as np

from launcher.data.order import Integers, permute, round_keys

STEPS_PER_POOL = 16
"""Steps whose samples are sorted by length together. More would pad less and mix less: 16 leave about
3 % padding, and an epoch of fewer than 64 steps (see `plan`) would make the same batches every time."""


def deal(lengths: Integers, num_chunks: int, *, budget_tokens: int | None = None) -> list[Integers]:
    """Deal the rows of one step into chunks of similar lengths, longest first.

    Args:
        lengths: int64 of shape (rows of the step,): tokens of each.
        num_chunks: micro-batches of the step over all workers.
        budget_tokens: padded tokens of a micro-batch, if that is what limits it; or None.

    Returns:
        `num_chunks` arrays of indices into `lengths`, the last ones perhaps empty. Where a budget is
        given, the chunk with the most padded tokens has as few as can be, so that no rank waits long for
        another; else their sizes differ by at most one.
    """
    longest_first = np.argsort(-lengths, kind="stable")
    if budget_tokens is None or len(lengths) <= num_chunks:
        return np.array_split(longest_first, num_chunks)
    # The smallest size of the largest chunk, by bisection: what the slowest rank does is what all wait for.
    descending = lengths[longest_first].tolist()
    low = max(descending[0], -(-sum(descending) // num_chunks))
    high = descending[0] * -(-len(descending) // num_chunks)
    while low < high:
        middle = (low + high) // 2
        if len(bounds_within(descending, middle)) <= num_chunks:
            high = middle
        else:
            low = middle + 1
    bounds = bounds_within(descending, high)
    bounds += [len(descending)] * (num_chunks - len(bounds))
    return np.split(longest_first, bounds[:-1])


def bounds_within(descending: list[int], most_tokens: int) -> list[int]:
    """Return where chunks end if each takes as many rows as `most_tokens` padded tokens hold."""
    bounds = [0]
    while bounds[-1] < len(descending):
        rows = max(1, most_tokens // max(1, descending[bounds[-1]]))
        bounds.append(min(bounds[-1] + rows, len(descending)))
    return bounds[1:]


def _equal_cuts(lengths: Integers, num_pieces: int) -> Integers:
    """Return where to cut for pieces of about the same number of tokens, none empty if there is enough."""
    done, inner = np.cumsum(lengths), np.arange(num_pieces - 1)
    wanted = (inner + 1) * (done[-1] / num_pieces)
    # The nearer of the two cuts around the exact one.
    cuts = np.searchsorted(done, wanted, side="left")
    before = np.where(cuts > 0, done[cuts - 1], 0)
    cuts = cuts + (done[cuts] - wanted <= wanted - before)
    cuts = np.maximum.accumulate(np.maximum(cuts, 1) - inner) + inner
    result: Integers = np.maximum(np.minimum(cuts, len(lengths) - num_pieces + 1 + inner), 0)
    return result


def rounds(lengths: Integers, *, num_workers: int, micro_batch: int, budget_tokens: int | None) -> int:
    """Return how many micro-batches each worker runs in a step: as few as the limits allow.

    Args:
        lengths: int64 of shape (rows of the step,): tokens of each.
        num_workers: workers that share the step.
        micro_batch: rows of a micro-batch, at most, where there is no budget.
        budget_tokens: padded tokens of a micro-batch, at most; or None.
    """
    rows_per_micro_batch = micro_batch
    if budget_tokens is not None and len(lengths):
        rows_per_micro_batch = max(1, budget_tokens // int(lengths.max()))
    rows_per_worker = -(-len(lengths) // num_workers)
    return max(1, -(-rows_per_worker // rows_per_micro_batch))


def steps_of_pool(
    lengths: Integers, *, num_steps: int, samples_per_step: int, by_tokens: bool, key: str
) -> list[Integers]:
    """Cut a pool into steps of like length, in a random order.

    Args:
        lengths: int64 of shape (samples of the pool,): tokens of each, in the global order.
        num_steps: steps of the pool.
        samples_per_step: of each step, unless there are too few; the last one may have fewer.
        by_tokens: the steps have the same number of tokens instead.
        key: decides the order of the steps.

    Returns:
        For each step, indices into `lengths`, longest first.
    """
    longest_first = np.argsort(-lengths, kind="stable")
    if not len(lengths):
        return [longest_first] * num_steps
    if by_tokens:
        steps = np.split(longest_first, _equal_cuts(lengths[longest_first], num_steps))
        whole = num_steps
    elif len(lengths) <= (num_steps - 1) * samples_per_step:
        steps, whole = np.array_split(longest_first, num_steps), num_steps
    else:
        steps = np.split(longest_first, np.arange(samples_per_step, len(lengths), samples_per_step))
        whole = len(lengths) // samples_per_step
    turns = permute(np.arange(whole, dtype=np.int64), max(1, whole), round_keys(key))
    return [*(steps[turn] for turn in turns), *steps[whole:]]


def best_fit(lengths: Integers, capacity: int, *, key: str) -> Integers:
    """Pack samples best-fit decreasing: each, longest first, into the fullest pack that still takes it.

    Samples of one length are interchangeable, so the work goes with the number of different lengths, not
    of samples (packing by histogram: Krell et al., "Efficient Sequence Packing without
    Cross-contamination", 2021).

    Args:
        lengths: int64 of shape (n,): tokens of each sample, from 1 to `capacity`.
        capacity: tokens of a pack, at most.
        key: decides which of the samples of one length goes where.

    Returns:
        int64 of shape (n,): the pack of each sample, from 0, without gaps.
    """
    packs = np.empty(len(lengths), dtype=np.int64)
    if not len(lengths):
        return packs
    shuffled = permute(np.arange(len(lengths), dtype=np.int64), len(lengths), round_keys(key))
    by_length = shuffled[np.argsort(lengths[shuffled], kind="stable")]
    distinct, firsts, counts = np.unique(lengths[by_length], return_index=True, return_counts=True)
    taken = dict(zip(distinct.tolist(), firsts.tolist(), strict=True))
    first_pack = 0
    for num_packs, content in _histogram(distinct[::-1].tolist(), counts[::-1].tolist(), capacity):
        for length, times in content:
            ids = np.repeat(np.arange(first_pack, first_pack + num_packs), times)
            packs[by_length[taken[length] : taken[length] + len(ids)]] = ids
            taken[length] += len(ids)
        first_pack += num_packs
    return packs


_Content = tuple[tuple[int, int], ...]


def _histogram(lengths: list[int], counts: list[int], capacity: int) -> list[tuple[int, _Content]]:
    """Return groups of packs that are alike: (how many, ((length, how often in each), …))."""
    # Room left -> groups with that room.
    rooms: defaultdict[int, list[tuple[int, _Content]]] = defaultdict(list)
    for length, left in zip(lengths, counts, strict=True):
        for room in sorted(room for room in rooms if room >= length):
            if not left:
                break
            groups, rooms[room] = rooms[room], []
            for num_packs, content in groups:
                left = _fill(rooms, num_packs, content, room, length, left)
        while left:
            left = _fill(rooms, -(-left // (capacity // length)), (), capacity, length, left)
        for room in [room for room, groups in rooms.items() if not groups]:
            del rooms[room]
    return list(itertools.chain.from_iterable(rooms.values()))


def _fill(
    rooms: defaultdict[int, list[tuple[int, _Content]]],
    num_packs: int,
    content: _Content,
    room: int,
    length: int,
    left: int,
) -> int:
    """Put samples of one length into a group of like packs; return how many are left."""
    times = room // length
    full = min(num_packs, left // times)
    if full:
        rooms[room - times * length].append((full, (*content, (length, times))))
        left -= full * times
        num_packs -= full
    if num_packs and left and left < times:
        rooms[room - left * length].append((1, (*content, (length, left))))
        left, num_packs = 0, num_packs - 1
    if num_packs and content:
        rooms[room].append((num_packs, content))
    return left
