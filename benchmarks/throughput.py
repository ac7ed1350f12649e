"""What training gives: tokens a second and model FLOPs against the device's measured peak, over a matrix of runs.

    python benchmarks/throughput.py [--ds 2 3] [--sizes small wide] [--lengths 128 512] [--workers 1 2] [--batching bucketed]
        [--data CHATS.jsonl] [--steps 30] [--quick] [--before EARLIER.json] [--out benchmarks/results/throughput.json]

Each row is a run of the launcher itself. Communication is measured in a second, shorter run of the same stage whose
collectives are timed: what a rank stands in them, waiting for the others included. With `--before`, each row is compared
with that of the same name in an earlier result. On a machine with GPUs (not run yet):

    python benchmarks/throughput.py --device gpu --sizes 1b 1.5b --lengths 2048 4096 8192 --workers 1 --batching packed

With `--out X.json` a picture is drawn as X.png.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from peers import running
from peers import work as works

WARM = 10


def main() -> None:
    """Run the matrix, print and keep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ds", type=int, nargs="+", default=[2, 3], help="ZeRO stages")
    parser.add_argument("--sizes", nargs="+", choices=works.SIZES, default=["small", "wide"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batching", choices=["bucketed", "packed"], default="bucketed")
    parser.add_argument("--data", type=Path, help="chats, one a line; default: made-up ones")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu", help="gpu: in bf16")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="one row")
    parser.add_argument("--before", type=Path, help="an earlier result")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.ds, options.sizes, options.lengths, options.workers = [2], ["small"], [512], [2]
        options.steps = WARM + 10
    before = json.loads(options.before.read_text())["rows"] if options.before else {}
    rows: dict[str, dict[str, float]] = {}
    print(_HEAD)
    for size, length, stage, workers in itertools.product(
        options.sizes, options.lengths, options.ds, options.workers
    ):
        name = f"{size}, {length} tokens, ZeRO-{stage}, {workers} workers, {options.batching}"
        with tempfile.TemporaryDirectory() as temp:
            work = works.make(
                Path(temp),
                "chats",
                options.data,
                batching=options.batching,
                size=size,
                max_length=length,
                workers=workers,
                device=options.device,
            )
            rows[name] = _row(work, stage, workers, options.steps)
        print(_line(name, rows[name], before.get(name)), flush=True)
    if options.out:
        options.out.write_text(json.dumps({"steps": options.steps, "rows": rows}, indent=1) + "\n")
        _draw(rows, options.out.with_suffix(".png"))


def _row(work: works.Work, stage: int, workers: int, steps: int) -> dict[str, float]:
    """Measure one row."""
    seen = running.launched(work, "it", stage, steps, workers)
    seconds, tokens, slots, samples, waits = (
        seen[name][WARM:] for name in ("seconds", "tokens", "slots", "samples", "data_seconds")
    )
    begin, done, total_s = seen["begin"], seen["done"], sum(seconds)
    rate = sum(tokens) / total_s
    row = {
        "tokens_per_s": rate,
        "samples_per_s": sum(samples) / total_s,
        "step_s": statistics.median(seconds),
        "step_s_p95": sorted(seconds)[int(0.95 * (len(seconds) - 1))],
        "padding": 1 - sum(tokens) / sum(slots),
        "model_flops_per_token": begin["flops_per_token"],
        "peak_flops_of_worker": begin["peak_flops"],
        "mfu": rate * begin["flops_per_token"] / (workers * begin["peak_flops"]),
        "data_wait": sum(waits) / total_s,
        "checkpoint_stall_s": done["checkpoint_stall_s"],
        "host_memory_bytes": done["memory"]["host"],
    }
    if done["memory"]["device"] is not None:
        row["device_memory_bytes"] = done["memory"]["device"]
    if workers > 1 and work.device == "cpu":
        timed = running.under_torchrun(work, "stage", stage, WARM + 10, workers)
        row["in_collectives"] = sum(timed["waits"][WARM:]) / sum(timed["seconds"][WARM:])
    return row


_HEAD = "tokens/s   samples/s  step (p95) s   padding  MFU    data    collectives  memory"


def _line(name: str, row: dict[str, float], before: dict[str, float] | None) -> str:
    line = f"{row['tokens_per_s']:8,.0f}   {row['samples_per_s']:8.1f}  {row['step_s']:.3f} ({row['step_s_p95']:.3f})"
    line += f"  {row['padding']:6.1%}  {row['mfu']:5.1%}  {row['data_wait']:6.2%}  {row.get('in_collectives', 0):6.1%}"
    line += f"       {row['host_memory_bytes'] / 2**20:6,.0f} MiB  {name}"
    return line if before is None else f"{line}  x {row['tokens_per_s'] / before['tokens_per_s']:.2f}"


def _draw(rows: dict[str, dict[str, float]], path: Path) -> None:
    """Draw tokens a second and MFU of all rows."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 0.6 + 0.35 * len(rows)), sharey=True)
    names = list(rows)[::-1]
    left.barh(names, [rows[name]["tokens_per_s"] for name in names])
    left.set_xlabel("useful tokens/s, all workers")
    right.barh(names, [100 * rows[name]["mfu"] for name in names])
    right.set_xlabel("model FLOPs, % of the measured matmul peak")
    figure.tight_layout()
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main()
