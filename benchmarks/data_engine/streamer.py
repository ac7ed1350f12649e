"""A process that streams one epoch, or longer, and prints the most memory it had. Not started by hand."""

import json
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.data_engine import stores  # noqa: E402

EVERY_STEPS = 5


def main() -> None:
    """Stream the store of the first argument; the others: batching, and seconds at least."""
    directory, kind, least_s = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
    source, num_steps = stores.feed(directory, kind), stores.steps_per_epoch(directory, kind)
    began_s, start = time.monotonic(), _memory_mb()
    peaks, step = start, 0
    while step < num_steps or time.monotonic() - began_s < least_s:
        step += 1
        batch = source.step(step)
        if step % EVERY_STEPS == 0:
            peaks = {name: max(peaks[name], now) for name, now in _memory_mb().items()}
        del batch
    print(
        json.dumps(
            {
                "start_anon_mb": start["RssAnon"],
                "anon_mb": peaks["RssAnon"],
                "file_mb": peaks["RssFile"],
                "steps": step,
            }
        )
    )


def _memory_mb() -> dict[str, float]:
    lines = Path("/proc/self/status").read_text().splitlines()
    found = dict(line.split(":") for line in lines if line.startswith(("RssAnon", "RssFile")))
    return {name: int(value.split()[0]) / 1e3 for name, value in found.items()}


if __name__ == "__main__":
    main()
