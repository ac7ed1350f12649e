"""Token stores of a given size, made quickly: blocks as the preparation makes them, of random tokens."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.data_engine.corpus import VOCABULARY
from launcher.data import store
from launcher.data.feed import Batching, Feed
from launcher.data.pack import best_fit

BYTES_PER_TOKEN = 4
BLOCK_BYTES = 4_000_000  # of text: what the preparation takes for data of less than 16 GB
MAX_LENGTH = 512
MICRO_BATCH_TOKENS = 8192
MICRO_BATCHES = 8
MEAN_LENGTH = 200
KINDS = ("random", "bucketed", "packed")


def make(folder: Path, sizes_gb: tuple[float, ...]) -> dict[float, Path]:
    """Make one store for each size of text, in GB; they share the files of their blocks."""
    counts = {size_gb: round(size_gb * 1e9 / BLOCK_BYTES) for size_gb in sizes_gb}
    largest = folder / "blocks"
    largest.mkdir()
    for number in range(max(counts.values())):
        _write_block(largest, number)
    made = {}
    for size_gb, count in counts.items():
        made[size_gb] = directory = folder / f"store-{size_gb:g}"
        _begin(directory, count)
        names = [store.block_name(number) for number in range(count)]
        for name in names:
            os.link(largest / name, directory / name)
        store.commit(directory, names)
    return made


def feed(directory: Path, kind: str, num_workers: int = 1) -> Feed:
    """Open a store anew and return the feed of rank 0: micro-batches of about 8,000 tokens."""
    opened = store.Store(directory)
    tokens_per_unit = MAX_LENGTH if kind == "packed" else MEAN_LENGTH
    tokens_per_step = MICRO_BATCH_TOKENS * MICRO_BATCHES * num_workers
    batching = Batching(
        kind=kind,  # type: ignore[arg-type]
        by_tokens=kind == "bucketed",
        units_per_step=tokens_per_step // tokens_per_unit,
        micro_batch=MICRO_BATCH_TOKENS // tokens_per_unit,
        budget_tokens=None if kind == "packed" else MICRO_BATCH_TOKENS,
    )
    return Feed(
        [opened],
        [1.0],
        batching,
        fingerprint=opened.manifest.fingerprint,
        seed=0,
        num_workers=num_workers,
        rank=0,
        pad_token_id=0,
    )


def steps_per_epoch(directory: Path, kind: str) -> int:
    """Return the steps of one epoch of `feed`, for one worker."""
    meta = store.read_meta(directory)
    assert meta is not None, "made whole"
    units = meta["counts"]["num_packs" if kind == "packed" else "num_samples"]
    return int(-(-units // feed(directory, kind).batching.units_per_step))


@dataclass(frozen=True, slots=True)
class Streamed:
    """What some steps of a feed gave one rank: tokens without padding, and bytes of all features."""

    num_tokens: float
    num_bytes: float


def stream(source: Feed, first: int, last: int, num_workers: int) -> Streamed:
    """Take the steps `first` to `last`, as a training would."""
    num_tokens = num_bytes = 0.0
    for step in range(first, last + 1):
        batch = source.step(step)
        num_tokens += batch.num_tokens / num_workers  # ranks have about the same share
        for micro_batch in batch.micro_batches:
            num_bytes += sum(values.nbytes for values in micro_batch.features.values())
    return Streamed(num_tokens, num_bytes)


def _write_block(directory: Path, number: int) -> None:
    draw = np.random.default_rng(number)
    count = BLOCK_BYTES // BYTES_PER_TOKEN // MEAN_LENGTH
    lengths = np.clip(draw.lognormal(5.0, 0.78, count), 8, MAX_LENGTH).astype(np.int64)
    # The id 0 is padding.
    ids = draw.integers(1, VOCABULARY, int(lengths.sum()), dtype=np.uint16)
    mask = np.ones(len(ids), dtype=np.uint8)
    pack = best_fit(lengths, MAX_LENGTH, key=str(number))
    counts = store.Counts(
        num_rows=count,
        num_samples=count,
        num_packs=int(pack.max()) + 1,
        num_tokens=len(ids),
        num_targets=len(ids) - count,
    )
    ragged = {store.INPUT_IDS: (ids, lengths), "target_mask": (mask, lengths)}
    scalars = {store.NUM_TARGETS: (lengths - 1).astype(np.int32)}
    store.write_block(directory / store.block_name(number), ragged, scalars, counts, pack=pack)


def _begin(directory: Path, num_chunks: int) -> None:
    store.write_manifest(
        directory,
        store.Manifest(
            fingerprint=f"benchmark of {num_chunks}",
            files=(),
            columns=("text",),
            chunk_bytes=BLOCK_BYTES,
            num_chunks=num_chunks,
            nominal=None,
            is_bounded=True,
        ),
    )
