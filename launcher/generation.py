"""One generation of workers: from their start to their end by success, by a wish of the driver's, or by a failure."""

import contextlib
import logging
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, Protocol

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from launcher import errors, failures, rescue
from launcher.bulletin import Bulletin
from launcher.errors import TrainingFailed
from launcher.group import NOT_STARTED, Group, trainer
from launcher.report.record import Event, Recorder
from launcher.report.view import View

POLL_S = 0.2
OF_THE_DRIVER = ("failure", "halved", "hung", "rolled_back", "left", "stopped")
"""Events that tell how workers ended."""
Reason = Literal["done", "stop", "preempted", "grow", "lost"]
"""Why a generation ended: all is trained; the driver wished it; a process or node was lost."""


class Watch(Protocol):
    """What looks after a generation while it trains."""

    def look(self, generation: "Generation") -> None: ...
    def interrupt(self, generation: "Generation") -> None: ...


class Generation:
    """Workers in training, seen from the driver."""

    def __init__(self, group: Group, view: View) -> None:
        self.group, self.view = group, view
        name = f"bulletin-{uuid.uuid4().hex[:12]}"
        # Beside the driver: on a worker's node it would go with that.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.bulletin = Bulletin.options(name=name, scheduling_strategy=here).remote()  # type: ignore[attr-defined]
        self.trainer = trainer(group, name)
        self.events: list[Event] = []
        self.num_read = 0
        self.failure: BaseException | None = None
        self.ended = threading.Event()
        self.rescue = rescue.Rescue(
            self.bulletin, group.num_workers, group.run_dir, group.hang_minutes, view.say
        )
        self.thread = threading.Thread(target=self._fit, daemon=True, name="fit")

    def run(self, watch: "Watch") -> Reason:
        """Train until this generation ends; show its events meanwhile.

        Args:
            watch: is called all the while; may `ask`.

        Returns:
            Why it ended.

        Raises:
            LauncherError: it cannot go on.
        """
        self.thread.start()
        with self._shown():
            # Not the thread's join: an interrupt in it makes Python take the thread for ended.
            while not self.ended.is_set():
                try:
                    self.ended.wait(POLL_S)
                    watch.look(self)
                    self.rescue.look()
                except KeyboardInterrupt:
                    watch.interrupt(self)
        if self.failure is None:
            left = [event for event in self.events if event["kind"] == "left"]
            return left[-1]["reason"] if left else "done"
        if self._is_lost():
            return "lost"
        raise self._cause() from self.failure

    def ask(self, wish: Reason) -> None:
        """Wish that the workers save at the next step and leave."""
        ray.get(self.bulletin.ask.remote(wish))

    @property
    def has_begun(self) -> bool:
        """Whether the workers have come to a stage."""
        return any(event["kind"] == "stage_begin" for event in self.events)

    @property
    def nodes(self) -> set[str]:
        """The nodes of its workers, as far as these have told."""
        return {event["node"] for event in self.events if event["kind"] == "worker"}

    def _take(self, event: Event) -> None:
        """Keep, record and show one event."""
        self._keep(event)
        if event["kind"] in OF_THE_DRIVER:
            self._record(event)
        try:
            self.view.show(event)
        except Exception as error:  # The view must never end a run, nor hide how one ended.
            logging.getLogger(__name__).warning("progress: %s: %s", type(error).__name__, error)

    def _keep(self, event: Event) -> None:
        """Keep an event; of steps in a row the first and the last, since a run makes millions."""
        if event["kind"] == "usage":
            return  # Nobody asks for it, and it would stand between steps in a row.
        if all(each["kind"] == "step" for each in (event, *self.events[-2:])) and len(self.events) > 1:
            self.events.pop()
        self.events.append(event)

    def _record(self, event: Event) -> None:
        """Write an event into the record that rank 0, which writes the rest of it, knows nothing of, or cannot tell."""
        with contextlib.suppress(OSError):  # A full disk is told by what cannot do without it.
            recorder = Recorder(self.group.run_dir / "metrics.jsonl")
            recorder.keep(event)
            recorder.close()

    def _fit(self) -> None:
        try:
            self.trainer.fit()
        except BaseException as failure:
            self.failure = failure
        finally:
            self.ended.set()

    def _is_lost(self) -> bool:
        if any(event["kind"] in ("stopped", "error") for event in self.events):
            return False
        # Ray could not start as many workers again as there were.
        inner = getattr(self.failure, "controller_failure", None)
        return isinstance(inner, NOT_STARTED) or any(event.get("ends") for event in self.events)

    def _cause(self) -> Exception:
        """Why the run was ended; else the last error that a worker reported; else what Ray says."""
        told = [e for e in self.events if e["kind"] == "stopped"] or [
            e for e in self.events if e["kind"] == "error"
        ]
        if told:
            kind = getattr(errors, told[-1]["type"], TrainingFailed)
            return kind(told[-1]["message"])  # type: ignore[no-any-return]
        workers = getattr(self.failure, "worker_failures", {}) or {}
        first = next(iter(workers.values()), self.failure)
        return TrainingFailed(
            f"the workers could not go on; the last error: {failures.last_line(first)} (logs:"
            f" {self.group.run_dir / 'logs'}). The same command continues from the last checkpoint"
        )

    @contextmanager
    def _shown(self) -> Iterator[None]:
        """Show the events that workers post, from a thread, until the block ends; then the rest of them."""
        stop = threading.Event()

        def drain() -> None:
            for event in ray.get(self.bulletin.read.remote(self.num_read), timeout=30):
                self.num_read += 1
                self._take(event)

        def poll() -> None:
            while not stop.wait(POLL_S):
                try:
                    drain()
                except Exception as error:  # What cannot be read now is read at the end.
                    logging.getLogger(__name__).warning("progress: %s", error)

        thread = threading.Thread(target=poll, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            drain()
            self.view.end_line()
