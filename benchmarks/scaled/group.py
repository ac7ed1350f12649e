"""Ranks as processes, perhaps on hosts of their own, and orders to all of them."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.scaled.work import ROOT

SCRIPT = Path(__file__).resolve().parent / "rank.py"


class Group:
    """Ranks that were started."""

    def __init__(self, processes: list[subprocess.Popen[str]], log: Path) -> None:
        self.processes, self.log = processes, log

    def tell(self, what: str, **order: Any) -> list[dict[str, Any]]:
        """Give all ranks an order, wait for all; return their answers.

        Raises:
            RuntimeError: one has ended.
        """
        for each in self.processes:
            print(json.dumps({"do": what, **order}), file=each.stdin, flush=True)
        answers = [each.stdout.readline() for each in self.processes if each.stdout]
        if not all(answers):
            raise RuntimeError(f"a rank has ended at {what}: {self.log.read_text()[-3000:]}")
        return [json.loads(answer) for answer in answers]


@contextmanager
def ranks(
    jobs: Path, log: Path, address: str, port: int, interface: str, before: Sequence[Sequence[str]]
) -> Iterator[Group]:
    """Start one process for each rank; end them all.

    Args:
        jobs: a pickled file of jobs by name.
        log: for what they print.
        address, port: where the first one waits for the others.
        interface: over which they meet.
        before: of each rank, the words that its command begins with.
    """
    own = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    own |= {"PATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    started: list[subprocess.Popen[str]] = []
    try:
        with log.open("a") as errors:
            for rank, words in enumerate(before):
                arguments = [str(rank), str(len(before)), address, str(port), interface, str(jobs)]
                started.append(
                    subprocess.Popen(
                        [*words, sys.executable, str(SCRIPT), *arguments],
                        env=own,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=errors,
                        text=True,
                    )
                )
        yield Group(started, log)
    finally:
        for each in started:
            if each.stdin:
                with contextlib.suppress(BrokenPipeError):
                    each.stdin.close()
        for each in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                each.wait(20)
            each.kill()
            each.wait()
