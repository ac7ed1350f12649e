"""The end of a run, good or bad: the facts put together, the verdict, and report.json in the run directory."""

import contextlib
import os
import platform
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from launcher import afterwards, failures, oom_kills, probes, storage, verdict
from launcher.errors import Hang, LauncherError, OutOfMemory
from launcher.report import history, opened, startup
from launcher.report.forecast import size
from launcher.report.history import History, Life
from launcher.report.record import parsed
from launcher.report.startup import Marks
from launcher.verdict import Cost, Facts, Verdict

REPORT, RUNNING = "report.json", "running"
TAIL_BYTES = 65_536
WRITE_EVERY_S = 10.0
"""How often the report is written anew while a run goes on: whoever reads it sees that its driver lives."""
ROUTINE = ("checkpoint", "export")
"""Events that the record has too: of earlier tries they are not kept."""
MOST_EVENTS, MOST_TRIES = 100, 20
"""Of each earlier try so many events are kept, and of so many tries."""


class Ending:
    """Waits for a run's end, to say and keep what it was."""

    def __init__(
        self,
        run_dir: Path,
        predicted: dict[str, dict[str, int | None]],
        say: Callable[[str], None],
        marks: Marks | None = None,
    ) -> None:
        """Begin: note what came of the try before, and that this one goes on.

        Args:
            run_dir: of the run.
            predicted: bytes at the peak, by stage.
            say: is told if the try before ended without a word.
            marks: of the start, where it is to be told what that was made of.
        """
        self.run_dir, self.predicted, self.marks = run_dir, predicted, marks
        self.lives: list[Life] = []
        self.begun_s, self.kills = time.time(), oom_kills.count()
        self.environment = _environment()
        self.page: Path | None = None
        self.earlier = _earlier(run_dir)
        if self.earlier and self.earlier[-1]["kind"] == "driver lost":
            say(
                "the try before this one ended without a word: its driver was killed, or its machine was lost"
            )
        self.ended, self.writing = threading.Event(), threading.Lock()
        self._write_running()
        threading.Thread(target=self._go_on_writing, daemon=True, name="report").start()

    def done(self, summary: dict[str, Any]) -> str:
        """Keep the report of a run that is done; return its verdict in one line."""
        self.ended.set()
        found = history.of(self.lives, [])
        # Stages that train jointly make each step together: it counts once.
        trained = {stage["name"] for stage in opened.event(self.run_dir)["stages"]} or set(summary["stages"])
        steps = sum(stage.get("steps", 0) for name, stage in summary["stages"].items() if name in trained)
        figures = f"{steps:,} steps, {time.time() - self.begun_s:,.0f} s in this try"
        judged = verdict.judge(Facts(error=None, figures=figures, cost=_cost(found, is_done=True)))
        self._write(judged.as_json(), found.events, summary)
        return judged.lines()[0]

    def failed(self, error: BaseException) -> BaseException:
        """Keep the report of a run that ended otherwise.

        Args:
            error: why.

        Returns:
            The error to raise, with the verdict's lines as a note.
        """
        self.ended.set()
        found = history.of(self.lives, _last_records(self.run_dir))
        if isinstance(error, Hang):
            found.said = {}  # Only that they were ended, as they were.
        judged = verdict.judge(self._facts(error, found))
        self._write(judged.as_json() | {"message": str(error)}, found.events)
        if judged.kind == "out of host memory" and not isinstance(error, OutOfMemory):
            error = OutOfMemory(str(error))
        page = [f"  report: {self.page}"] if self.page else []
        error.add_note("\n".join([*judged.lines(), *page]))
        return error

    def _go_on_writing(self) -> None:
        wait_s = WRITE_EVERY_S
        while not self.ended.wait(wait_s):
            begun_s = time.monotonic()
            self._write_running()
            # A run of a hundred thousand checkpoints has a long report: it is not to keep the driver busy.
            wait_s = min(3 * WRITE_EVERY_S, max(WRITE_EVERY_S, 50 * (time.monotonic() - begun_s)))

    def _write_running(self) -> None:
        # The lists grow meanwhile, in another thread.
        lives = [replace(life, events=list(life.events)) for life in self.lives]
        judged = {"kind": RUNNING, "host": socket.gethostname(), "pid": os.getpid()}
        self._write(judged, history.of(lives, []).events)

    def _facts(self, error: BaseException, found: History) -> Facts:
        rank = min(_causes(found.said), default=0)
        log = self.run_dir / "logs" / f"rank-{rank}.log"
        return Facts(
            error=error,
            said=found.said,
            is_lost=found.is_lost,
            oom_kills=self._killed(found),
            nodes_gone=sum(life.nodes_gone for life in self.lives),
            is_preempted=any(life.reason == "preempted" for life in self.lives[-2:]),
            seen=tuple(self._seen(found, rank, log)),
            cost=_cost(found, is_done=False),
            continues=f"from step {found.saved} of stage {found.stage}" if found.stage else "",
            log=str(log.relative_to(self.run_dir)),
        )

    def _killed(self, found: History) -> int:
        """How many processes the kernel killed for memory on the run's hosts, since workers began there."""
        here, killed = socket.gethostname(), 0
        for host, (first, last) in found.oom_kills.items():
            killed += (max(last, oom_kills.count()) if host == here else last) - first
        return killed

    def _seen(self, found: History, rank: int, log: Path) -> list[str]:
        seen = []
        if found.stage:
            seen.append(
                f"last step {found.step} of {found.num_steps} of stage {found.stage}, saved at {found.saved}"
            )
        for each, said in sorted(_causes(found.said).items())[:2]:
            host = f" on {found.hosts[each]}" if found.hosts.get(each) else ""
            seen.append(f"rank {each}{host}: {failures.last_line(Exception(said))}")
        if said := _last_line(_tail(log)):
            seen.append(f"{log.relative_to(self.run_dir)} ends: {said}")
        if bytes_ := self.predicted.get(found.stage, {}).get("host"):
            there = psutil.virtual_memory().total
            seen.append(
                f"host memory: {size(bytes_)} predicted for a worker, {size(there)} on the driver's machine"
            )
        return seen

    def _write(
        self, judged: dict[str, Any], events: list[dict[str, Any]], summary: dict[str, Any] | None = None
    ) -> None:
        now_s = time.time()
        if self.lives:
            self.environment["hosts"] = {
                str(rank): host for rank, host in history.of(self.lives, []).hosts.items()
            }
        report = {
            "verdict": judged,
            "begun": round(self.begun_s, 3),
            "ended": None if judged["kind"] == RUNNING else round(now_s, 3),
            "seconds": round(now_s - self.begun_s, 1),
            "startup": startup.told(self.marks, self.lives) if self.marks else None,
            "summary": summary,
            "events": events,
            "environment": self.environment,
            "earlier": self.earlier,
        }
        # A full disk is told by its own error, which must not be hidden by this one.
        with self.writing, contextlib.suppress(OSError):
            if judged["kind"] != RUNNING or not self.ended.is_set():
                storage.write_json(self.run_dir / REPORT, report)
        if judged["kind"] != RUNNING:
            self.page = afterwards.tell(self.run_dir)


def before_a_run(error: BaseException) -> str:
    """Return the verdict of a run that never began, in one line."""
    judged = verdict.judge(Facts(error=error))
    return f"verdict: {judged.kind} (exit code {judged.exit_code}): no training was started"


def exit_code(error: BaseException) -> int:
    """Return the exit code of the process that an error ends."""
    if isinstance(error, KeyboardInterrupt):
        return verdict.STOPPED
    return error.exit_code if isinstance(error, LauncherError) else 1


def _earlier(run_dir: Path) -> list[dict[str, Any]]:
    """What came of the tries before this one, in short."""
    old = storage.read_json(run_dir / REPORT)
    last = _last_records(run_dir)
    if old is None and not last:
        return []
    earlier = list(old["earlier"]) if old else []
    for each in earlier[: 1 - MOST_TRIES]:
        each.pop("events", None)
    short = (
        {name: old[name] for name in ("begun", "ended", "seconds", "startup") if name in old} if old else {}
    )
    if old:
        short["events"] = [e for e in old["events"] if e["kind"] not in ROUTINE][-MOST_EVENTS:]
    if old and old["verdict"]["kind"] != RUNNING:
        judged: Verdict | dict[str, Any] = old["verdict"]
        return [*earlier, {**short, **{k: judged[k] for k in ("kind", "exit_code", "cost") if k in judged}}]
    steps = [each for each in last if each["kind"] == "step"]
    seen = {"stage": steps[-1]["stage"], "step": steps[-1]["step"]} if steps else {}
    ended = last[-1]["time"] if last else None
    return [*earlier, {**short, "ended": ended, "kind": "driver lost", "exit_code": None, **seen}]


def _environment() -> dict[str, Any]:
    """With what a run is made: the command, the versions of what matters, the commit of a checkout, the machine."""
    root = Path(__file__).resolve().parent.parent
    commit = ""
    if (root / ".git").exists():
        describe = ["git", "-C", str(root), "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            commit = subprocess.run(describe, capture_output=True, text=True, timeout=5).stdout.strip()
    return {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "versions": probes.versions(),
        "commit": commit or None,
        "driver": socket.gethostname(),
        "system": platform.platform(),
    }


def _causes(said: dict[int, str]) -> dict[int, str]:
    """What the ranks said that failed by themselves; of all, where each only missed another."""
    return {rank: text for rank, text in said.items() if not failures.says_peer_is_gone(text)} or said


def _cost(found: History, *, is_done: bool) -> Cost:
    lost = 0 if is_done else max(0, found.step - found.saved)
    return Cost(
        steps=lost,
        seconds=round(max(0.0, found.step_s - found.saved_s), 1) if lost else 0.0,
        restarts=found.restarts,
        restart_s=round(found.restart_s, 1),
        again=found.again,
    )


def _last_records(run_dir: Path) -> list[dict[str, Any]]:
    # Its first line may be one of which the tail has only the end.
    return [
        event for event in map(parsed, _tail(run_dir / "metrics.jsonl").splitlines()) if event is not None
    ]


def _tail(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1].strip()[:300]
