"""Samples to batches: the samples of one optimizer step, dealt into micro-batches by their lengths. Pure.

The set of samples of a step never depends on the number of workers; only who runs which does. Chunk
c of a step is run by rank c % num_workers as its micro-batch c // num_workers, so the chunks that
ranks run at the same time are neighbours in length, and none waits for another's padding.
"""

import numpy as np

from launcher.data.order import Integers


def deal(lengths: Integers, num_chunks: int) -> list[Integers]:
    """Deal the samples of one step into chunks of similar lengths, longest first.

    Args:
        lengths: int64 of shape (samples of the step,): tokens of each.
        num_chunks: micro-batches of the step over all workers.

    Returns:
        `num_chunks` arrays of indices into `lengths`, sizes differing by at most one; the last may be
        empty when there are more chunks than samples.
    """
    longest_first = np.argsort(-lengths, kind="stable")
    return np.array_split(longest_first, num_chunks)


def padding_share(lengths: Integers, num_chunks: int) -> float:
    """Return the share of a step's token slots that would be padding."""
    chunks = [lengths[chunk] for chunk in deal(lengths, num_chunks) if len(chunk)]
    slots = sum(len(chunk) * int(chunk.max()) for chunk in chunks)
    return 1.0 - int(lengths.sum()) / slots if slots else 0.0
