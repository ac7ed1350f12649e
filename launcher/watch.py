"""See a run from any shell: the view of its driver, drawn from the files of its run directory alone."""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from launcher import listing, storage, verdict
from launcher.errors import BadInput, LauncherError, tell
from launcher.listing import Run
from launcher.report import lines, opened, words
from launcher.report import summary as report
from launcher.report.history import BREAKS
from launcher.report.record import Event
from launcher.report.tail import Tail
from launcher.report.view import View

LOOK_EVERY_S, STATE_EVERY_S = 0.5, 2.0
LOST = 1
"""The exit code for a run whose driver is gone: the code of its own is not known."""
_OF_REPORT = (*BREAKS, "restart", "resize", "left")
"""What only the driver knows, and puts into its report while the run goes on."""


def main(argv: Sequence[str] | None = None) -> int:
    """Show a run until it ends; return its exit code, as its verdict says it."""
    options = parser().parse_args(argv)
    try:
        run = _meant(options.run, options.run_root)
        return _Watch(run, View()).once() if options.once else _Watch(run, View()).follow()
    except KeyboardInterrupt:
        print("the run goes on; see it again: launcher watch", file=sys.stderr)
        return 130
    except (LauncherError, OSError) as error:
        return tell(error)


def parser() -> argparse.ArgumentParser:
    """Return the parser."""
    found = argparse.ArgumentParser(prog="launcher watch", description=(__doc__ or "").strip())
    found.add_argument(
        "run", nargs="?", help="a run directory, or a run's name; default: the newest that is going"
    )
    found.add_argument("--run-root", metavar="DIR", help="where runs are kept; default: as for a run")
    found.add_argument("--once", action="store_true", help="print how it is, and leave")
    return found


def _meant(name: str | None, root: str | None) -> Run:
    places = listing.roots(root)
    if name is not None:
        run = listing.find(name, places)
        if run.state == "unreadable":
            raise BadInput(f"{run.path}: cannot be read: {run.kind}")
        return run
    found = [run for place in places for run in listing.all_in(place)]
    going = [run for run in found if run.state == "running"]
    if going:
        return going[-1]
    where = ", ".join(map(str, places)) or "runs, ~/launcher-runs"
    last = f"; the last was {found[-1].name}: {found[-1].state}" if found else ""
    raise BadInput(f"no run is going in {where}{last}: name one, or another --run-root")


class _Watch:
    """One run, seen through its files."""

    def __init__(self, run: Run, view: View) -> None:
        self.run, self.view = run, view
        self.tail = Tail(run.path / listing.RECORD)
        self.num_told = len(run.report.get("events") or [])
        self.looked_s = time.monotonic()
        self.done: set[str] = set()
        self.told: set[tuple[str, float]] = set()
        self.try_begun = run.report.get("begun")

    def once(self) -> int:
        """Print how the run is; return 0 while it goes on, else its exit code."""
        self._prime()
        print("\n".join(_state_lines(self.run, self.view.progress)), flush=True)
        return self._code()

    def follow(self) -> int:
        """Show the run until it ends; return its exit code."""
        self._prime()
        self.view.say(f"run: {self.run.path}")
        try:
            if self.run.state == "running":
                self.view.show(listing.restarts(self.run))
            while self.run.state == "running":
                time.sleep(LOOK_EVERY_S)
                for event in self._new():
                    self.view.show(event)
        finally:
            self.view.end_line()
        self.view.say("\n".join(_state_lines(self.run, self.view.progress)))
        return self._code()

    def _code(self) -> int:
        return LOST if self.run.state == "driver lost" else self.run.exit_code

    def _prime(self) -> None:
        """Take what was before, without its lines."""
        for event in listing.events(self.run, self.tail):
            self.view.prime(event)
        self.done = {stage.name for stage in self.view.progress.stages.values() if stage.is_done}

    def _new(self) -> Iterator[Event]:
        """Yield what has come since, of all files."""
        for event in self.tail.new():
            if event["kind"] in _OF_REPORT:
                self.told.add((event["kind"], event["time"]))
            yield event
        if time.monotonic() - self.looked_s < STATE_EVERY_S:
            return
        self.looked_s = time.monotonic()
        self.run = replace(listing.look(self.run.path, self.run.path.parent), name=self.run.name)
        for name in list(self.view.progress.stages):
            if name not in self.done and (ended := opened.done(self.run.path, name)) is not None:
                self.done.add(name)
                yield {"kind": "stage_done", "stage": name, **ended}
        events = self.run.report.get("events") or []
        if self.run.report.get("begun") != self.try_begun:
            # The same command was started once more.
            self.try_begun, self.num_told = self.run.report.get("begun"), 0
        new, self.num_told = events[self.num_told :], len(events)
        for event in new:
            # A record may hold it too, and sooner.
            if event["kind"] in _OF_REPORT and (event["kind"], event["time"]) not in self.told:
                yield event
        yield listing.restarts(self.run)


def _state_lines(run: Run, progress: Any) -> list[str]:
    """Return a run's state, or its end, in words."""
    found = [f"{run.name}: {run.state}" + (f" ({run.kind})" if run.state in ("failed", "stopped") else "")]
    if run.state == "done" and (summary := storage.read_json(run.path / listing.SUMMARY)):
        return [*found, *report.end_lines(summary, str(run.path)), *_verdict_lines(run)]
    for stage in progress.stages.values():
        is_now = stage.name == progress.stage and not stage.is_done
        state = "done" if stage.is_done else "now" if is_now and run.state == "running" else "to come"
        at = progress.step if is_now else None
        steps = f"step {at:,} of {progress.num_steps:,}" if at else f"{stage.num_steps:,} steps"
        state = "begun" if at and state == "to come" else state
        found.append(f"  {stage.name}: {state}, {steps}  {words.metrics(stage.metrics)}".rstrip())
    if run.state == "running" and progress.last:
        found.append(f"  {lines.step(progress, progress.padding(), progress.data_share())}")
        found.append(f"  {lines.usage(progress, time.time())}")
    if run.state == "driver lost":
        ago = lines.duration(max(0.0, time.time() - run.seen_s))
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(run.seen_s))
        found.append(
            f"  nothing has come since {at}, {ago} ago: its driver was killed, or its machine was lost; the same"
            " command continues it"
        )
    elif run.state != "running":
        found += _verdict_lines(run)
    return found


def _verdict_lines(run: Run) -> list[str]:
    told = run.report.get("verdict") or {}
    if "next" not in told:
        return []
    message = [f"error: {told['message']}"] if told.get("message") and run.state == "failed" else []
    return [*message, *verdict.of_json(told).lines()]
