"""How long others take to the middle of a data set: they read, and throw away, what comes before."""

import itertools
import logging
from pathlib import Path
from typing import Any

from benchmarks.data_engine import corpus
from benchmarks.data_engine.corpus import Corpus
from benchmarks.data_engine.measure import Figure, timed
from benchmarks.data_engine.preparing import OnCores

SIZE_MB = 1000
ROWS = 32
PLACES = (0.0, 0.5, 0.99)


def resume(text: Corpus, folder: Path) -> list[Figure]:
    """Measure the first batch of rows at places of 1 GB of JSON lines, once each; nothing is tokenised."""
    file = corpus.write_jsonl(folder / "large.jsonl", lambda: corpus.plain_rows(text), SIZE_MB * 1_000_000)
    with open(file, "rb") as lines:
        num_rows = sum(1 for _ in lines)
    figures = []
    _streaming(file, 0)
    for place in PLACES:
        taken, _ = timed(lambda row=int(place * (num_rows - ROWS)): _streaming(file, row))
        figures.append(Figure(name=f"datasets streaming, .skip to {place:.0%}", value=taken.wall_s, unit="s"))
    with OnCores():
        _ray_data(file, 0)
        # Its first execution sets up its log anew.
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        for place in PLACES:
            taken, _ = timed(lambda row=int(place * (num_rows - ROWS)): _ray_data(file, row))
            figures.append(Figure(name=f"Ray Data, iterated to {place:.0%}", value=taken.wall_s, unit="s"))
    file.unlink()
    return figures


def _streaming(file: Path, row: int) -> list[Any]:
    import datasets

    rows = datasets.load_dataset("json", data_files=str(file), split="train", streaming=True)
    return list(itertools.islice(rows.skip(row), ROWS))


def _ray_data(file: Path, row: int) -> Any:
    import ray

    ray.data.DataContext.get_current().enable_progress_bars = False
    for batch in ray.data.read_json(str(file)).iter_batches(batch_size=1024, batch_format="pyarrow"):
        row -= batch.num_rows
        if row < 0:
            return batch
    raise AssertionError("the place is inside the file")
