"""What a person sees while a run goes: one live line on a terminal, plain lines elsewhere."""

import sys
import time
from typing import TextIO

from launcher.report.record import Event

PLAIN_EVERY_S = 5.0
LIVE_EVERY_S = 0.2


class View:
    """Shows events as they come."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.is_live = self.stream.isatty()
        self.shown_at_s = self.prepared_at_s = 0.0
        self.first: Event | None = None
        self.begun: Event = {}
        self.has_open_line = False
        self.slots = self.tokens = 0
        self.data_s = self.step_s = 0.0

    def show(self, event: Event) -> None:
        """Show one event of the record."""
        show = getattr(self, f"_{event['kind']}", None)
        if show is not None:
            show(event)

    def say(self, text: str) -> None:
        """Print a line of its own."""
        self.end_line()
        print(text, file=self.stream, flush=True)

    def end_line(self) -> None:
        """Close the live line, so that what follows stands below it."""
        if self.has_open_line:
            print(file=self.stream, flush=True)
            self.has_open_line = False

    def _stage_begin(self, event: Event) -> None:
        self.first, self.begun, self.shown_at_s = None, event, 0.0
        self.slots = self.tokens = 0
        self.data_s = self.step_s = 0.0
        since = f", continuing after step {event['start']}" if event["start"] else ""
        self.say(
            f"stage {event['stage']}: {event['num_steps']} steps of {event['units_per_step']}"
            f" {event['unit']}{since}"
        )

    def _preparation(self, event: Event) -> None:
        if self.begun:
            return  # Training shows its own line.
        now = time.monotonic()
        if not (event["is_whole"] or self.is_live or now - self.prepared_at_s >= PLAIN_EVERY_S):
            return
        self.prepared_at_s = now
        line = f"preparing {event['store']}: {event['done']}/{event['chunks']} chunks"
        line += f", {event['tokens']:,} tokens"
        if event["chunks"] > 1 and event["seconds"]:
            line += f", {event['tokens'] / event['seconds']:,.0f} tokens/s"
        line += f", {event['bad']:,} bad rows" if event["bad"] else ""
        if event["is_whole"] or not self.is_live:
            self.say(line)
        else:
            print(f"\r\x1b[2K{line}", end="", file=self.stream, flush=True)
            self.has_open_line = True

    def _preparation_failed(self, event: Event) -> None:
        self.say(f"the preparation of the data has stopped: {event['reason']}")

    def _step(self, event: Event) -> None:
        self.first = self.first or event
        self.slots += event["slots"]
        self.tokens += event["tokens"]
        self.data_s += event["data_s"]
        self.step_s += event["step_s"]
        now = time.monotonic()
        is_last = event["step"] == self.begun.get("num_steps")
        every_s = LIVE_EVERY_S if self.is_live else PLAIN_EVERY_S
        if now - self.shown_at_s < every_s and not is_last:
            return
        self.shown_at_s = now
        line = self._line(event)
        if self.is_live:
            print(f"\r\x1b[2K{line}", end="", file=self.stream, flush=True)
            self.has_open_line = True
        else:
            print(line, file=self.stream, flush=True)

    def _line(self, event: Event) -> str:
        num_steps = self.begun.get("num_steps", 0)
        line = (
            f"{event['stage']}  step {event['step']}/{num_steps}  loss {event['loss']:.4f}"
            f"  lr {event['lr']:.2e}"
        )
        first = self.first or event
        elapsed_s = event["time"] - first["time"]
        steps = event["step"] - first["step"]
        if steps > 0 and elapsed_s > 0:
            per_step_s = elapsed_s / steps
            left_s = per_step_s * (num_steps - event["step"])
            line += f"  {event['samples'] / per_step_s:,.0f} samples/s"
            line += f"  {event['tokens'] / per_step_s:,.0f} tokens/s"
            line += f"  padding {1 - self.tokens / max(1, self.slots):.1%}"
            line += f"  data wait {self.data_s / max(1e-9, self.step_s):.1%}"
            line += f"  {_duration(left_s)} left"
        return line

    def _eval(self, event: Event) -> None:
        values = "  ".join(f"{name} {value:.4f}" for name, value in event["metrics"].items())
        self.say(f"{event['stage']}  step {event['step']}  eval: {values}")

    def _after(self, event: Event) -> None:
        values = "  ".join(f"{name} {value:.4f}" for name, value in event["metrics"].items())
        self.say(f"{event['stage']}  again, after {event['last']}: {values}")

    def _export(self, event: Event) -> None:
        self.say(f"stage {event['stage']}: model written to {event['path']}")

    def _left(self, event: Event) -> None:
        at = f"step {event['step']} of stage {event['stage']}" if event["stage"] else "the end of a stage"
        self.say(f"saved at {at}")

    def _halved(self, event: Event) -> None:
        self.say(
            f"{event['reason']}\ngoing on from the last checkpoint with half the micro-batch (on_oom: shrink)"
        )

    def _hung(self, event: Event) -> None:
        self.say("they were ended; going on from the last checkpoint")

    def _skipped(self, event: Event) -> None:
        self.say(f"{event['stage']}  step {event['step']} skipped: {event['fault']}")

    def _rolled_back(self, event: Event) -> None:
        self.say(
            f"{event['reason']}\ngoing on from the last checkpoint, and past step {event['step']} (on_nan: rollback)"
        )

    def _failure(self, event: Event) -> None:
        self.say(f"a worker failed ({event['reason']}); going on from the last checkpoint")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
