"""Token stores made by hand, block by block, as the preparation makes them."""

from pathlib import Path

import numpy as np

from launcher.data import store
from launcher.data.pack import best_fit


def flat(sequences: list[list[int]], dtype: str = "int32") -> store.Ragged:
    """Sequences as (values one after another, lengths)."""
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    return np.array([token for sequence in sequences for token in sequence], dtype=dtype), lengths


def write_block(
    directory: Path,
    chunk: int,
    ids: list[list[int]],
    *,
    capacity: int | None = None,
    first_label: int | None = None,
) -> None:
    """Write a block of causal-lm samples (the first token bears no loss), or of classified ones."""
    ragged = {"input_ids": flat(ids)}
    lengths = ragged["input_ids"][1]
    scalars = {"num_targets": np.maximum(lengths - 1, 0).astype(np.int32)}
    pack = None
    if first_label is None:
        ragged["target_mask"] = flat([[0, *[1] * (len(x) - 1)] for x in ids], "uint8")
    else:
        scalars = {"num_targets": np.ones(len(ids), np.int32)}
        scalars["labels"] = (np.arange(len(ids)) + first_label).astype(np.int32)
    if capacity is not None:
        pack = best_fit(lengths, capacity, key=str(chunk))
    counts = store.Counts(
        num_rows=len(ids),
        num_samples=len(ids),
        num_packs=int(pack.max()) + 1 if pack is not None and len(pack) else 0,
        num_tokens=int(lengths.sum()),
        num_targets=int(scalars["num_targets"].sum()),
    )
    store.write_block(directory / store.block_name(chunk), ragged, scalars, counts, pack=pack)


def begin(directory: Path, sizes: list[int], *, nominal: bool = True, fingerprint: str = "f") -> None:
    """Write the manifest of a store of bounded chunks."""
    store.write_manifest(
        directory,
        store.Manifest(
            fingerprint=fingerprint,
            files=(("/data/a.parquet", 10, 1),),
            columns=("text",),
            chunk_bytes=4096,
            num_chunks=len(sizes),
            nominal=tuple(sizes) if nominal else None,
            is_bounded=True,
        ),
    )


def make(
    directory: Path,
    blocks: list[list[list[int]]],
    *,
    nominal: list[int] | None = None,
    capacity: int | None = None,
    labelled: bool = False,
    fingerprint: str = "f",
) -> store.Store:
    """Make a whole store of the given blocks."""
    begin(
        directory, nominal or [len(b) for b in blocks], nominal=nominal is not None, fingerprint=fingerprint
    )
    first = 0
    for chunk, ids in enumerate(blocks):
        write_block(directory, chunk, ids, capacity=capacity, first_label=first if labelled else None)
        first += len(ids)
    store.commit(directory, [store.block_name(chunk) for chunk in range(len(blocks))])
    return store.Store(directory)


def samples(num_samples: int, longest: int = 17, seed: int = 0) -> list[list[int]]:
    """Samples that tell who they are: the tokens of sample i begin at 100 i + 1."""
    lengths = np.random.default_rng(seed).permutation(num_samples) % longest + 1
    return [(np.arange(length) + 100 * i + 1).tolist() for i, length in enumerate(lengths)]


def in_blocks(ids: list[list[int]], sizes: list[int]) -> list[list[list[int]]]:
    """Cut samples into blocks."""
    ends = np.cumsum([0, *sizes]).tolist()
    return [ids[ends[i] : ends[i + 1]] for i in range(len(sizes))]
