"""Useful tokens a second: the launcher against Hugging Face's Trainer with DeepSpeed, and against a bare DeepSpeed loop.

    python benchmarks/vs_peers.py [--work chats] [--data CHATS.jsonl] [--stages 2 3] [--rounds 3] [--steps 60] [--quick]
        [--only CONTENDER ...] [--out benchmarks/results/vs_peers.json]
    python benchmarks/vs_peers.py --work sentences --data TRAIN.parquet --model MINILM --only stage trainer
    python benchmarks/vs_peers.py --work translation --data TRAIN.parquet --only stage trainer

On a machine with GPUs (not run yet); stage is the launcher's stage without Ray, so that Ray need not be installed there:

    python benchmarks/vs_peers.py --device gpu --size 1.5b --length 4096 --workers 1 --only stage stage-packed trainer

On CPUs two ranks with a thread each, fp32; all contenders get the same tokens, from the launcher's store. They run one after
the other, in rounds, so that what the machine does besides meets all of them; a round gives each one's sum over its steps
after the first ten. Useful: not padding. The Trainer's groups come longest first, and repeat after 50 steps: 60 steps see
all of their lengths.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))


from peers import running
from peers import work as works

WARM = 10
CONTENDERS = {
    "launcher": "the launcher",
    "launcher-packed": "the launcher, packed",
    "launcher-compiled": "the launcher, with model.compile",
    "launcher-both": "the launcher, packed, with model.compile",
    "stage": "the launcher's stage without Ray",
    "stage-packed": "the launcher's stage without Ray, packed",
    "stage-both": "the launcher's stage without Ray, packed, with model.compile",
    "trainer": "HF Trainer, padded to the longest of the batch",
    "trainer-grouped": "HF Trainer, grouped by length",
    "trainer-max": "HF Trainer, padded to the full length",
    "loop": "bare DeepSpeed loop, padded",
    "loop-ours": "bare DeepSpeed loop on the launcher's batches",
}
VARIANTS = {"launcher-compiled": "compiled"} | {
    f"{kind}-{variant}": variant for kind in ("launcher", "stage") for variant in ("packed", "both")
}


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", choices=works.KINDS, default="chats")
    parser.add_argument("--data", type=Path, help="chats, one a line (default: made-up ones), or Parquet")
    parser.add_argument("--model", type=Path, help="a pretrained one, for sentences")
    parser.add_argument("--size", choices=works.SIZES, default="small", help="of the Llama, for chats")
    parser.add_argument(
        "--length", type=int, help="tokens of a sample at most (default: 512; 128 for --work others)"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu", help="gpu: in bf16")
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--quick", action="store_true", help="ZeRO-2 alone, one round, 20 steps")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--show", type=Path, help="measure nothing: print the tables of an earlier result")
    options = parser.parse_args()
    if options.show:
        _show(json.loads(options.show.read_text())["rounds"])
        return
    if options.quick:
        options.stages, options.rounds, options.steps = [2], 1, WARM + 10
    found: dict[str, list[dict[str, Any]]] = {f"zero{stage}": [] for stage in options.stages}
    with tempfile.TemporaryDirectory() as temp:
        works_of = {name: _work(Path(temp) / name, name, options) for name in _variants(options.only)}
        for number, stage in itertools.product(range(options.rounds), options.stages):
            print(f"round {number + 1}, ZeRO-{stage}", flush=True)
            found[f"zero{stage}"].append(_round(works_of, stage, options))
            if options.out:
                _keep(options, found)
    _show(found)


def _keep(options: argparse.Namespace, found: dict[str, list[dict[str, Any]]]) -> None:
    """Write what there is: a measurement of hours may be cut short."""
    tree = {
        "work": options.work,
        "data": options.data.name if options.data else "made up",
        "model": options.model.name if options.model else options.size,
        "length": options.length,
        "workers": options.workers,
        "device": options.device,
        "steps": options.steps,
        "rounds": found,
    }
    options.out.write_text(json.dumps(tree, indent=1) + "\n")


def _variants(kinds: list[str]) -> set[str]:
    return {VARIANTS.get(kind, "plain") for kind in kinds}


def _work(folder: Path, name: str, options: argparse.Namespace) -> works.Work:
    folder.mkdir()
    batching = "packed" if name in ("packed", "both") else "bucketed"
    return works.make(
        folder,
        options.work,
        options.data,
        batching=batching,
        model=options.model,
        compile=name in ("compiled", "both"),
        size=options.size,
        max_length=options.length,
        workers=options.workers,
        device=options.device,
    )


def _round(works_of: dict[str, works.Work], stage: int, options: argparse.Namespace) -> dict[str, Any]:
    found = {}
    for kind in options.only:
        if VARIANTS.get(kind) in ("compiled", "both") and stage == 3:
            continue  # Refused: see model.compile.
        work = works_of[VARIANTS.get(kind, "plain")]
        run = running.launched if kind.startswith("launcher") else running.under_torchrun
        found[kind] = figures(run(work, kind, stage, options.steps, options.workers), options.workers)
        print(f"  {kind}: {found[kind]['tokens_per_s_and_rank']:,.0f}", flush=True)
    return found


def figures(record: dict[str, Any], workers: int) -> dict[str, float]:
    """What a run of so many workers came to, after its first steps."""
    seconds, tokens, slots = (record[name][WARM:] for name in ("seconds", "tokens", "slots"))
    rates = [count / second / workers for count, second in zip(tokens, seconds, strict=True)]
    losses, rate = record["losses"], sum(tokens) / sum(seconds) / workers
    begin = record["begin"]  # Of the launcher's stage; empty of others.
    mfu = {"mfu": rate * begin["flops_per_token"] / begin["peak_flops"]} if begin.get("peak_flops") else {}
    return {
        "tokens_per_s_and_rank": rate,
        "median_of_steps": statistics.median(rates),
        "step_s": statistics.median(seconds),
        "step_s_p95": sorted(seconds)[int(0.95 * (len(seconds) - 1))],
        "padding": 1 - sum(tokens) / sum(slots),
        "tokens_seen": sum(record["tokens"]),
        "first_loss": losses[0],
        "last_loss": statistics.mean(losses[-10:]),
        **mfu,
        **_of_the_processor(record, tokens),
    }


def _of_the_processor(record: dict[str, Any], tokens: list[int]) -> dict[str, float]:
    """What the ranks themselves used, where they say it."""
    if "cpu_seconds" not in record:
        return {}
    return {"tokens_per_cpu_s": sum(tokens) / sum(record["cpu_seconds"][WARM:])}


def _show(found: dict[str, list[dict[str, Any]]]) -> None:
    for name, rounds in found.items():
        if rounds:
            _print(name.replace("zero", "ZeRO-"), rounds)


def _print(name: str, rounds: list[dict[str, Any]]) -> None:
    best, measures = next(iter(rounds[0])), ("tokens_per_s_and_rank", "tokens_per_cpu_s")
    print(
        f"{name}: tokens/s and rank, of it padding beside; {best} / each, and so by the processor's seconds"
    )
    for kind, first in rounds[0].items():
        rates = [each[kind]["tokens_per_s_and_rank"] for each in rounds]
        line = f"  {statistics.median(rates):7,.0f}  {first['padding']:6.1%}"
        for measure in measures:
            if measure in first and measure in rounds[0][best]:
                ratios = [each[best][measure] / each[kind][measure] for each in rounds]
                line += f"  {statistics.median(ratios):5.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        if mfus := [each[kind]["mfu"] for each in rounds if "mfu" in each[kind]]:
            line += f"  MFU {statistics.median(mfus):.1%}"
        print(
            f"{line}  loss {first['last_loss']:.3f} at {first['tokens_seen']:,.0f} tokens  {CONTENDERS[kind]}"
        )


if __name__ == "__main__":
    main()
