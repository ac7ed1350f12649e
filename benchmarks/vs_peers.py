"""Useful tokens a second: the launcher against Hugging Face's Trainer with DeepSpeed, and against a bare DeepSpeed loop.

    python benchmarks/vs_peers.py [--data CHATS.jsonl] [--stages 2 3] [--rounds 3] [--steps 60] [--quick]
        [--out benchmarks/results/vs_peers.json]

Two CPU ranks with a thread each, fp32, a small Llama, 16 samples a step, at most 512 tokens; all contenders get the same
tokens, from the launcher's store. They run one after the other, in rounds, so that what the machine does besides
meets all of them; a round gives each one's median over its steps after the first ten. Useful: not padding.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import itertools

from peers import work as works

ROOT = works.ROOT
WARM = 10
CONTENDERS = {
    "launcher": "the launcher",
    "launcher-packed": "the launcher, packed",
    "trainer": "HF Trainer, padded to the longest of the batch",
    "trainer-grouped": "HF Trainer, grouped by length",
    "trainer-max": "HF Trainer, padded to 512",
    "loop": "bare DeepSpeed loop, padded",
    "loop-ours": "bare DeepSpeed loop on the launcher's batches",
}


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="chats, one a line; default: made-up ones")
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--quick", action="store_true", help="ZeRO-2 alone, one round, 20 steps")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.stages, options.rounds, options.steps = [2], 1, WARM + 10
    found = {}
    with tempfile.TemporaryDirectory() as temp:
        works_of = {}
        for batching in ("bucketed", "packed"):
            folder = Path(temp) / batching
            folder.mkdir()
            works_of[batching] = works.make(folder, options.data, batching)
        for stage in options.stages:
            rounds = [_round(works_of, stage, options) for _ in range(options.rounds)]
            found[f"zero{stage}"] = rounds
            _print(f"ZeRO-{stage}", rounds)
    if options.out:
        tree = {
            "data": options.data.name if options.data else "made up",
            "steps": options.steps,
            "rounds": found,
        }
        options.out.write_text(json.dumps(tree, indent=1) + "\n")


def _round(works_of: dict[str, works.Work], stage: int, options: argparse.Namespace) -> dict[str, Any]:
    found = {}
    for kind in options.only:
        work = works_of["packed" if kind == "launcher-packed" else "bucketed"]
        run = launched if kind.startswith("launcher") else under_torchrun
        found[kind] = figures(run(work, kind, stage, options.steps))
        print(f"  {kind}: {found[kind]['tokens_per_s_and_rank']:,.0f}", flush=True)
    return found


def figures(record: dict[str, Any]) -> dict[str, float]:
    """What a run came to, after its first steps."""
    seconds, tokens, slots = (record[name][WARM:] for name in ("seconds", "tokens", "slots"))
    rates = [count / second / 2 for count, second in zip(tokens, seconds, strict=True)]
    losses = record["losses"]
    return {
        "tokens_per_s_and_rank": sum(tokens) / sum(seconds) / 2,
        "median_of_steps": statistics.median(rates),
        "step_s": statistics.median(seconds),
        "step_s_p95": sorted(seconds)[int(0.95 * (len(seconds) - 1))],
        "padding": 1 - sum(tokens) / sum(slots),
        "tokens_seen": sum(record["tokens"]),
        "first_loss": losses[0],
        "last_loss": statistics.mean(losses[-10:]),
    }


def under_torchrun(work: works.Work, kind: str, stage: int, steps: int) -> dict[str, Any]:
    """Run a contender of `peers/loops.py` on two ranks."""
    out = Path(work.folder) / "out.json"
    script = str(ROOT / "benchmarks" / "peers" / "loops.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    _run([*command, str(work.save()), kind, str(stage), str(steps), str(out)], work)
    return json.loads(out.read_text())


def launched(work: works.Work, kind: str, stage: int, steps: int) -> dict[str, Any]:
    """Make the run by the launcher; read its record."""
    runs = Path(work.folder) / "runs"
    command = [
        sys.executable,
        "launcher/run.py",
        work.recipe,
        "--ds",
        f"ds_configs/zero{stage}.json",
        "--fresh",
    ]
    command += [
        "--workers",
        "2",
        "--run-root",
        str(runs),
        "--name",
        kind,
        "--set",
        f"stages.chat.steps={steps}",
    ]
    _run(command, work)
    lines = (runs / kind / "metrics.jsonl").read_text().splitlines()
    events = [event for event in map(json.loads, lines) if event["kind"] == "step"]
    ended = [events[0]["time"] - events[0]["step_s"], *(event["time"] for event in events)]
    shutil.rmtree(runs / kind)
    return {
        "seconds": [after - before for before, after in itertools.pairwise(ended)],
        "tokens": [event["tokens"] for event in events],
        "slots": [event["slots"] for event in events],
        "losses": [event["loss"] for event in events],
    }


def _run(command: list[str], work: works.Work) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    own = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    own |= {"PATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")


def _print(name: str, rounds: list[dict[str, Any]]) -> None:
    kinds = list(rounds[0])
    best = "launcher" if "launcher" in kinds else kinds[0]
    print(f"{name}: tokens/s and rank, of it padding beside; {best} / each")
    for kind in kinds:
        rates = [each[kind]["tokens_per_s_and_rank"] for each in rounds]
        ratios = [
            each[best]["tokens_per_s_and_rank"] / each[kind]["tokens_per_s_and_rank"] for each in rounds
        ]
        print(
            f"  {statistics.median(rates):7,.0f}  {rounds[0][kind]['padding']:6.1%}"
            f"  {statistics.median(ratios):5.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            f"  loss {rounds[0][kind]['last_loss']:.3f} at {rounds[0][kind]['tokens_seen']:,} tokens"
            f"  {CONTENDERS[kind]}"
        )


if __name__ == "__main__":
    main()
