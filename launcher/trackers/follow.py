"""The process of one tracker: it reads the record behind the run, and never stands in its way.

    python -m launcher.trackers.follow RUN_DIR NAME [SECONDS]

The run's driver starts it, and it goes on until its input ends, which the end of the driver does too, however that
comes; then it sends what is left, for 10 seconds at most, or as many as it is given. What it has sent is noted in the
run directory, so the next try goes on there. It prints at most one line, for the driver to show: what is wrong, if
something is.
"""

import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import filelock
import yaml

from launcher import __version__, storage, trackers
from launcher import recipe as recipes
from launcher.report import points, words
from launcher.report.points import Telling
from launcher.report.reading import Reading
from launcher.trackers import FOLDER, About, Status, Tracker

EVERY_S = 2.0
LAST_S = 10.0
"""How long it may take for what is left at a run's end."""
RETRY_S = (5.0, 15.0, 60.0)
"""How long to wait after a failure, after a second one, and after each one more."""
GAVE_UP = 1
_NICE = 10
_ENDS: dict[str, Status] = {"done": "done", "running": "open", "stopped by the user": "stopped"}


class Follower:
    """Sends one run's record to one tracker."""

    def __init__(self, run_dir: Path, name: str, asked: Any, about: About) -> None:
        self.name, self.asked, self.about = name, asked, about
        self.file = run_dir / FOLDER / f"{name}.json"
        # What leads elsewhere is another tracker: that one gets all of the record.
        self.place = asked.model_dump(mode="json", exclude={"tags", "every_steps"})
        noted = storage.read_json(self.file) or {}
        if noted.get("place") != self.place:
            noted = {}
        self.id: str | None = noted.get("id")
        self.reading = Reading(run_dir / "metrics.jsonl", noted.get("position", 0))
        self.telling = Telling(asked.every_steps, **noted.get("telling", {}))
        self.tracker: Tracker | None = None

    def send(self) -> None:
        """Send all that the record holds by now."""
        tracker = self.tracker or self._begin()
        while events := self.reading.take():
            tracker.send(list(self.telling.points(events)))
            self._note()

    def end(self) -> None:
        """Send the end of a try, as the driver has told it."""
        assert self.tracker is not None
        report = storage.read_json(self.about.run_dir / "report.json") or {}
        kind = report.get("verdict", {}).get("kind", "running")
        summary = storage.read_json(self.about.run_dir / "summary.json") or {}
        self.tracker.end(_ENDS.get(kind, "failed"), points.final(summary))

    def undo(self) -> None:
        """Go back to what is noted, after a failure."""
        noted = storage.read_json(self.file) or {}
        same = noted.get("place") == self.place
        self.reading.position = noted["position"] if same else 0
        self.telling = Telling(self.asked.every_steps, **(noted["telling"] if same else {}))
        self.tracker = None

    def _begin(self) -> Tracker:
        tracker = trackers.create(self.asked, self.about)
        begun = tracker.begin(self.id)
        if begun != self.id:
            self.id, self.reading.position = begun, 0
            self.telling = Telling(self.asked.every_steps)
            self._note()
        self.tracker = tracker
        return tracker

    def _note(self) -> None:
        telling = self.telling.state()
        noted = {"place": self.place, "id": self.id, "position": self.reading.position, "telling": telling}
        storage.write_json(self.file, noted)


def follow(follower: Follower, ended: threading.Event, say: Any) -> int:
    """Send until the run has ended; return the exit code: 0 if all of it was sent.

    Args:
        follower: of one tracker.
        ended: is set when the record will not grow any more.
        say: is told what is wrong, once.
    """
    failures = 0
    while True:
        is_last = ended.is_set()
        try:
            follower.send()
            if is_last:
                follower.end()
                return 0
            failures, wait_s = 0, EVERY_S
        except Exception as error:
            logging.getLogger(__name__).exception("%s", follower.name)
            failures += 1
            if failures == 1 and say is not None:
                say(
                    f"{follower.name} does not take the record ({_in_a_line(error)}); the run goes on without it"
                )
                say = None
            if is_last:
                return GAVE_UP
            follower.undo()
            wait_s = RETRY_S[min(failures, len(RETRY_S)) - 1]
        ended.wait(wait_s)


def about(run_dir: Path, asked: Any) -> About:
    """Return what a tracker is told of a run once, out of its directory."""
    tree = yaml.safe_load((run_dir / "recipe.yaml").read_text(encoding="utf-8"))
    ds_config = storage.read_json(run_dir / "ds.json") or {}
    of_run = {name: value for name, value in tree.items() if name != "trackers"}
    model = tree["model"]["path"] or tree["model"]["config"]
    tags = {
        "launcher": __version__,
        "run_dir": str(run_dir),
        "model": model if isinstance(model, str) else str(model.get("model_type", "config")),
        "tasks": " ".join(dict.fromkeys(stage["task"] for stage in tree["stages"])),
        **asked.tags,
    }
    parameters = points.flat(of_run) | points.flat(ds_config, "ds")
    given = {name: _redacted(value) for name, value in parameters.items() if value not in (None, [], {})}
    tags = {name: words.redacted(value) for name, value in tags.items()}
    return About(run_dir=run_dir, name=trackers.run_name(run_dir), parameters=given, tags=tags)


def _redacted(value: Any) -> Any:
    """A leaf of the recipe without what opens doors: it goes to a service that others see too."""
    if isinstance(value, list):
        return [_redacted(each) for each in value]
    return words.redacted(value) if isinstance(value, str) else value


def _in_a_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def _wait_for_end(ended: threading.Event, last_s: float) -> None:
    while os.read(0, 1024):
        pass
    ended.set()
    time.sleep(last_s)
    # Whatever its library waits for, or would still do on its way out.
    os._exit(GAVE_UP)


def main() -> None:
    """Follow the run that the command line names."""
    run_dir, name = Path(sys.argv[1]).absolute(), sys.argv[2]
    last_s = float(sys.argv[3]) if len(sys.argv) > 3 else LAST_S
    # Stopping the run is the driver's: what is left is to be sent after that.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.nice(_NICE)
    told = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    logging.basicConfig(level=logging.WARNING)
    ended = threading.Event()
    threading.Thread(target=_wait_for_end, args=(ended, last_s), daemon=True).start()
    recipe = recipes.parse(yaml.safe_load((run_dir / "recipe.yaml").read_text(encoding="utf-8")))
    asked = dict(zip(trackers.names(recipe.trackers), recipe.trackers, strict=True))[name]
    (run_dir / FOLDER).mkdir(exist_ok=True)
    # The process of a try before this one may still be sending.
    with filelock.FileLock(run_dir / FOLDER / f"{name}.lock", timeout=3 * LAST_S):
        follower = Follower(run_dir, name, asked, about(run_dir, asked))
        code = follow(follower, ended, lambda line: print(line, file=told, flush=True))
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
