"""How fast a prepared store becomes batches, from which place, and in how much memory."""

import json
import os
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.data_engine import stores
from benchmarks.data_engine.measure import Figure, Time, alternate, at_most, timed

STEPS_PER_ROUND = 150
FEED_ROUNDS = 5
RESUME_ROUNDS = 5
PLACES = (0.0, 0.5, 0.99)
MOST_RESUME_S = 0.05
COPY_BYTES = 256 << 20
# Read: two bytes of each id, one of the mask. Written: ids, labels, and mask or position, eight bytes each.
BYTES_READ_PER_TOKEN = 3
LEAST_STREAM_S = 10
MOST_GROWTH = 1.2
STREAMER = Path(__file__).parent / "streamer.py"


def feed(made: dict[float, Path]) -> list[Figure]:
    """Answer: how many tokens a second, and what share of the memory's bandwidth that is."""
    figures = []
    for kind in stores.KINDS:
        for num_workers in (1, 8) if kind == "bucketed" else (1,):
            figures += _beside_copy(made[1.0], kind, num_workers)
    return figures


def resume(made: dict[float, Path]) -> list[Figure]:
    """Answer: how long from opening a store to the first batch at a place of the epoch."""
    figures = []
    for kind in stores.KINDS:
        num_steps = stores.steps_per_epoch(made[1.0], kind)
        steps = [1 + int(place * (num_steps - 1)) for place in PLACES]
        ways = [partial(_first_batch_s, made[1.0], kind, step) for step in steps]
        medians = [statistics.median(each) for each in alternate(ways, RESUME_ROUNDS)]
        figures += [
            at_most(f"{kind}, {place:.0%} of 1 GB", seconds, "s", MOST_RESUME_S)
            for place, seconds in zip(PLACES, medians, strict=True)
        ]
        _forget(made[1.0])
        seconds = _first_batch_s(made[1.0], kind, steps[1], 0)
        figures.append(Figure(name=f"{kind}, 50%, nothing of it in the page cache", value=seconds, unit="s"))
    return figures


def memory(made: dict[float, Path]) -> list[Figure]:
    """Answer: how much memory a fresh process needs for an epoch, by the size of the data."""
    figures = []
    for kind in ("bucketed", "packed"):
        peaks = {}
        for size_gb, directory in made.items():
            if size_gb == 1.0:
                continue
            peaks[size_gb] = peak = _streamed(directory, kind)
            figures += [
                Figure(name=f"{kind}, {size_gb:g} GB: {part}", value=peak[key], unit="MB")
                for key, part in (
                    ("start_anon_mb", "anonymous, before"),
                    ("anon_mb", "anonymous, peak"),
                    ("file_mb", "file-backed, peak"),
                )
            ]
        small, large = peaks[min(peaks)], peaks[max(peaks)]
        figures += [
            at_most(f"{kind}: anonymous, largest against smallest", grown, "times", MOST_GROWTH)
            for grown in [large["anon_mb"] / small["anon_mb"]]
        ]
        middle = peaks[sorted(peaks)[1]]
        grown = large["file_mb"] / middle["file_mb"]
        figures.append(at_most(f"{kind}: file-backed, 2 GB against 0.5 GB", grown, "times", MOST_GROWTH))
    return figures


def _beside_copy(directory: Path, kind: str, num_workers: int) -> list[Figure]:
    """Take turns: some steps of the feed, and a copy of as many bytes as they had."""
    source = stores.feed(directory, kind, num_workers)
    original = np.ones(COPY_BYTES // 8, dtype=np.int64)
    copy = np.empty_like(original)
    seen: list[stores.Streamed] = []

    def steps(number: int) -> float:
        first = 1 + number * STEPS_PER_ROUND
        taken, streamed = timed(
            lambda: stores.stream(source, first, first + STEPS_PER_ROUND - 1, num_workers)
        )
        seen.append(streamed)
        return streamed.num_tokens / taken.wall_s

    def copied(_: int) -> float:
        taken: Time = timed(lambda: np.copyto(copy, original))[0]
        return COPY_BYTES / taken.wall_s

    copied(0)
    rates, bandwidths = alternate([steps, copied], FEED_ROUNDS)
    num_tokens, num_bytes = (sum(getattr(s, name) for s in seen) for name in ("num_tokens", "num_bytes"))
    written = num_bytes / num_tokens
    shares = [rate * written / bandwidth for rate, bandwidth in zip(rates, bandwidths, strict=True)]
    named = f"{kind}: " if num_workers == 1 else f"{kind}, one of {num_workers} ranks: "
    return [
        Figure(name=named + "tokens without padding", value=statistics.median(rates), unit="tokens/s"),
        Figure(name=named + "bytes read of a token", value=BYTES_READ_PER_TOKEN, unit="bytes"),
        Figure(name=named + "bytes written of a token", value=written, unit="bytes"),
        Figure(name=named + "a copy of int64", value=statistics.median(bandwidths) / 1e9, unit="GB/s"),
        Figure(name=named + "share of the copy's bytes/s", value=statistics.median(shares), unit=""),
    ]


def _first_batch_s(directory: Path, kind: str, step: int, _: int) -> float:
    taken, batch = timed(lambda: stores.feed(directory, kind).step(step))
    assert batch.num_samples, "the place is inside the epoch"
    return taken.wall_s


def _forget(directory: Path) -> None:
    """Drop a store's files from the page cache."""
    for file in directory.iterdir():
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _streamed(directory: Path, kind: str) -> dict[str, float]:
    command = [sys.executable, str(STREAMER), str(directory), kind, str(LEAST_STREAM_S)]
    peak: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return peak
