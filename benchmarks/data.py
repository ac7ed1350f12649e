"""Measure the data engine: how fast rows become tokens and tokens batches, from any place, in how much memory.

python benchmarks/data.py [question ...] [--text FILE] [--size-mb N] [--run DIR] [--out FILE]
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent
# Run as a script, Python puts this folder on the path, not the one above it.
sys.path[0] = str(ROOT.parent)

from benchmarks.data_engine import corpus, feeding, measure, peers, preparing, stores, waiting  # noqa: E402

QUESTIONS = ("prepare", "feed", "resume", "memory", "start", "wait")
STORES_GB = (0.1, 0.5, 1.0, 2.0)


def main() -> None:
    """Answer the questions asked; print a table, and write the figures where that is asked."""
    asked = _arguments()
    preparing.one_core()
    record = {"machine": measure.machine(), "text": "made by rule", "size_mb": asked.size_mb}
    if asked.text is not None:
        record["text"] = asked.text.name
    with tempfile.TemporaryDirectory(prefix="data-benchmark-") as folder:
        answers = _answers(asked, Path(folder))
    print(measure.table(answers))
    if asked.out is not None:
        record["questions"] = {
            name: [asdict(figure) | {"value": float(f"{figure.value:.5g}")} for figure in figures]
            for name, figures in answers.items()
        }
        asked.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("questions", nargs="*", metavar="question", help=f"{', '.join(QUESTIONS)}; all")
    parser.add_argument("--text", type=Path, help="JSON lines with text or messages, instead of made text")
    parser.add_argument("--size-mb", type=float, default=32.0, help="text for prepare; default %(default)g")
    parser.add_argument("--run", type=Path, help="for wait: a run's directory")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    asked = parser.parse_args()
    if unknown := set(asked.questions) - set(QUESTIONS):
        parser.error(f"no such question: {', '.join(sorted(unknown))}; there are: {', '.join(QUESTIONS)}")
    if "wait" in asked.questions and asked.run is None:
        parser.error("wait needs --run DIR")
    asked.questions = asked.questions or [name for name in QUESTIONS if name != "wait" or asked.run]
    return asked


def _answers(asked: argparse.Namespace, folder: Path) -> dict[str, list[measure.Figure]]:
    num_bytes = round(asked.size_mb * 1e6)
    if {"prepare", "resume", "start"} & set(asked.questions):
        text = corpus.make(num_bytes) if asked.text is None else corpus.read(asked.text, num_bytes)
        model = corpus.save_tokenizer(text, folder / "model")
    if {"feed", "resume", "memory"} & set(asked.questions):
        made = stores.make(folder, STORES_GB)
    ways = {
        "prepare": lambda: preparing.prepare(text, model, folder),
        "feed": lambda: feeding.feed(made),
        "resume": lambda: feeding.resume(made) + peers.resume(text, folder),
        "memory": lambda: feeding.memory(made),
        "start": lambda: preparing.start(text, model, folder),
        "wait": lambda: waiting.wait(asked.run),
    }
    answers = {}
    for name in asked.questions:
        began_s = time.monotonic()
        answers[name] = ways[name]()
        print(f"{name}: {time.monotonic() - began_s:.0f} s", file=sys.stderr)
    return answers


if __name__ == "__main__":
    main()
