"""Making the token stores: which chunk next, on which executor, beside which other run; seen from the driver.

A thread hands chunks to an executor in the order in which training wants them. One run at a time makes
a store; another that wants the same one waits for its blocks. What is made stays, so an interrupted
preparation goes on where it was.
"""

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import filelock

from launcher import prepare, storage
from launcher.data import store
from launcher.data.order import BLOCKS_PER_WINDOW
from launcher.errors import LauncherError
from launcher.prepare import StoreJob

POLL_S = 0.2
TELL_EVERY_S, BEAT_EVERY_S = 1.0, 2.0

Tell = Callable[[dict[str, Any]], None]


class Executor(Protocol):
    """Where tasks run."""

    def room(self) -> bool:
        """Tell whether another task would begin soon."""
        ...

    def submit(self, function: Callable[..., Any], *args: Any) -> Any:
        """Begin a task; return a handle."""
        ...

    def done(self, timeout_s: float) -> list[tuple[Any, Any]]:
        """Return (handle, result) of the tasks that have ended, waiting a little for the first."""
        ...

    def cancel(self) -> None:
        """End the tasks under way."""
        ...


class Inline:
    """Runs each task at once, in this process."""

    def __init__(self) -> None:
        self._ended: list[tuple[Any, Any]] = []

    def room(self) -> bool:
        """See `Executor`."""
        return not self._ended

    def cancel(self) -> None:
        """See `Executor`."""

    def submit(self, function: Callable[..., Any], *args: Any) -> Any:
        """See `Executor`."""
        handle = object()
        self._ended.append((handle, function(*args)))
        return handle

    def done(self, timeout_s: float) -> list[tuple[Any, Any]]:
        """See `Executor`."""
        ended, self._ended = self._ended, []
        if not ended:
            time.sleep(timeout_s)
        return ended


class Preparation:
    """The stores of a run, being made."""

    def __init__(self, jobs: Sequence[StoreJob], executor: Executor, tell: Tell | None = None) -> None:
        self.jobs, self.executor = list(jobs), executor
        # Two stages may want the same store.
        self._making = {job.directory: _Making(job) for job in jobs}
        self._tell = tell or (lambda event: None)
        self._error: BaseException | None = None
        self._at: Path | None = None
        self._stop = threading.Event()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="preparation", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def wait_for(self, jobs: Sequence[StoreJob], first: Sequence[StoreJob] = ()) -> None:
        """Return when some stores are whole and, of others, the first window's blocks are there.

        Raises:
            LauncherError: what stopped the preparation.
        """

        def ready() -> bool:
            # A model's head needs them, whenever its stage comes.
            if any(prepare.labels_of(job) is None for job in self.jobs):
                return False
            whole = all(self._making[job.directory].is_whole for job in jobs)
            return whole and all(self._making[job.directory].has_first_window() for job in first)

        with self._changed:
            while not ready():
                if self._error is not None:
                    raise self._error
                self._changed.wait(POLL_S)

    def close(self) -> None:
        """Let no further task begin, and end those under way: a block appears whole or not at all."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        with ExitStack() as locks:
            try:
                self._make_all(locks)
            except BaseException as error:
                self._fail(error)
            finally:
                self.executor.cancel()

    def _make_all(self, locks: ExitStack) -> None:
        makings = list(self._making.values())
        labels = [_Labels(group, self._making[group[0].labels_from]) for group in _labelled(self.jobs)]
        pending: dict[Any, tuple[_Making | _Labels, int]] = {}
        while not self._stop.is_set() and not all(making.is_whole for making in makings):
            for making in makings:
                making.take(locks)
            while self.executor.room() and (task := _next([*labels, *makings])) is not None:
                owner, function, job, chunk = task
                pending[self.executor.submit(function, job, chunk)] = (owner, chunk)
            for handle, result in self.executor.done(POLL_S):
                owner, chunk = pending.pop(handle)
                if isinstance(result, LauncherError):
                    self._at = owner.directory
                    raise result
                owner.end(chunk, result)
            for making in makings:
                self._at = making.directory
                making.beat()
                if making.settle() or making.is_told_due():
                    self._tell(making.event())
            self._at = None
            with self._changed:
                self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        self._error = error
        with self._changed:
            self._changed.notify_all()
        if not self._stop.is_set():
            self._tell({"kind": "preparation_failed", "reason": str(error)})
        if self._at is not None:
            # Workers that wait for a block of this store read it there.
            storage.write_json(self._at / store.ERROR, {"message": str(error)})


def make_all(jobs: Sequence[StoreJob], executor: Executor | None = None) -> None:
    """Make stores and wait for all of them; by default in this process, one chunk after another.

    Raises:
        LauncherError: the data cannot be used.
    """
    preparation = Preparation(jobs, executor or Inline())
    preparation.start()
    try:
        preparation.wait_for(jobs)
    finally:
        preparation.close()


class _Making:
    """One store and how far it is."""

    def __init__(self, job: StoreJob) -> None:
        self.job, self.directory = job, Path(job.directory)
        self.is_whole = self._is_whole()
        self.is_ours = False
        self.counts = store.Counts()
        self.num_begun = 0
        self.waiting: list[int] = []
        self.made: set[int] = set()
        self.began_s = self.told_s = time.monotonic()
        self.beaten_s = 0.0

    def take(self, locks: ExitStack) -> None:
        """Try to become the one who makes this store; see what is there already."""
        if self.is_whole or self.is_ours:
            return
        lock = filelock.FileLock(self.directory / store.LOCK)
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            # Another run makes it; what it has made is as good as ours.
            self.is_whole = self._is_whole()
            return
        locks.callback(lock.release)
        self.is_ours = True
        self.is_whole = self._is_whole()
        if self.is_whole:
            return
        storage.delete(self.directory / store.META)
        storage.delete(self.directory / store.ERROR)
        for leftover in self.directory.glob(".block-*"):
            storage.delete(leftover)
        known = {chunk: prepare.chunk_counts(self.job, chunk) for chunk in self.job.order}
        self.waiting = [chunk for chunk, counts in known.items() if counts is None]
        self.made = {chunk for chunk, counts in known.items() if counts is not None}
        self.began_s = time.monotonic()

    def _is_whole(self) -> bool:
        return store.read_meta(self.directory) is not None and prepare.labels_of(self.job) is not None

    def next(self) -> "Task | None":
        """Return what to begin now, if anything."""
        if not self.is_ours or not self.waiting or prepare.labels_of(self.job) is None:
            return None
        self.num_begun += 1
        return self, prepare.make_chunk, self.job, self.waiting.pop(0)

    def end(self, chunk: int, result: Any) -> None:
        """Take a task's result."""
        self.counts += result
        self.made.add(chunk)

    def settle(self) -> bool:
        """Commit what has become whole; tell whether the store did."""
        if not self.is_ours or self.is_whole or len(self.made) < self.job.num_chunks:
            return False
        if prepare.labels_of(self.job) is None:
            return False
        prepare.finish(self.job)
        self.is_whole = True
        return True

    def is_at_its_first_window(self) -> bool:
        """Whether what it begins next is wanted soon."""
        return self.num_begun < BLOCKS_PER_WINDOW

    def has_first_window(self) -> bool:
        """Whether training could begin."""
        if self.is_whole:
            return True
        first = self.job.order[:BLOCKS_PER_WINDOW]
        if self.is_ours:
            return self.made.issuperset(first)
        return all(prepare.chunk_counts(self.job, chunk) is not None for chunk in first)

    def beat(self) -> None:
        """Show who waits for a block that somebody is at work."""
        now_s = time.monotonic()
        if self.is_ours and not self.is_whole and now_s - self.beaten_s >= BEAT_EVERY_S:
            self.beaten_s = now_s
            (self.directory / store.BEAT).touch()

    def is_told_due(self) -> bool:
        """Whether a person should hear how far it is."""
        now_s = time.monotonic()
        if not self.is_ours or self.is_whole or now_s - self.told_s < TELL_EVERY_S:
            return False
        self.told_s = now_s
        return True

    def event(self) -> dict[str, Any]:
        """Return how far it is, for the view."""
        return {
            "kind": "preparation",
            "store": self.job.name,
            "done": len(self.made),
            "chunks": self.job.num_chunks,
            "tokens": self.counts.num_tokens,
            "bad": self.counts.num_bad,
            "seconds": round(time.monotonic() - self.began_s, 3),
            "is_whole": self.is_whole,
        }


class _Labels:
    """The label words of one stage: gathered from all rows of its train split before the first block."""

    def __init__(self, jobs: Sequence[StoreJob], first: _Making) -> None:
        self.jobs, self.first, self.directory = list(jobs), first, first.directory
        self.waiting: list[tuple[StoreJob, int]] | None = None
        self.found: set[Any] = set()
        self.num_left = 0

    def next(self) -> "Task | None":
        """Return what to begin now, if anything: only who makes the first store looks for labels."""
        if self.waiting is None:
            if not self.first.is_ours:
                return None
            is_settled = prepare.labels_of(self.jobs[0]) is not None
            all_chunks = [(job, chunk) for job in self.jobs for chunk in job.order]
            self.waiting = [] if is_settled else all_chunks
            self.num_left = len(self.waiting)
        if not self.waiting:
            return None
        return self, prepare.label_values, *self.waiting.pop(0)

    def is_at_its_first_window(self) -> bool:
        """Whether what it begins next is wanted soon: nothing begins without the labels."""
        return True

    def end(self, chunk: int, result: Any) -> None:
        """Take a task's result; with the last one the labels are known."""
        self.found.update(result)
        self.num_left -= 1
        if self.num_left == 0:
            prepare.settle_labels(self.jobs[0], self.found)


Task: TypeAlias = tuple[_Making | _Labels, Callable[..., Any], StoreJob, int]


def _labelled(jobs: Sequence[StoreJob]) -> list[list[StoreJob]]:
    """Group the train data sets whose rows tell the labels of a stage."""
    groups: dict[tuple[int, str], list[StoreJob]] = {}
    for job in jobs:
        if job.labels_from and job.split == "train":
            groups.setdefault((job.stage, job.labels_from), []).append(job)
    return list(groups.values())


def _next(owners: Sequence[_Making | _Labels]) -> Task | None:
    # The first blocks of every store come before the rest of any: then nothing waits for long.
    first = [owner for owner in owners if owner.is_at_its_first_window()]
    return next((task for owner in [*first, *owners] if (task := owner.next()) is not None), None)
