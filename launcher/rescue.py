"""What the driver does about workers that hang: see it, ask why, tell it, end them. The rest is a failure's way."""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from launcher import hangs, processes, storage
from launcher.heart import stacks_file
from launcher.processes import Process, Seen
from launcher.pulse import Beat
from launcher.report.record import Recorder

LOOK_EVERY_S = 1.0
NODE_WITHIN_S = 20.0
"""How long a node may take to begin and do what is asked of it: a process may have to be started there."""

T = TypeVar("T")


class Rescue:
    """Watches the heartbeats of one generation of workers."""

    def __init__(
        self, bulletin: Any, num_workers: int, run_dir: Path, hang_minutes: float | None, say: Any
    ) -> None:
        """Begin to watch.

        Args:
            bulletin: the actor that heartbeats come to.
            num_workers: of the generation.
            run_dir: of the run.
            hang_minutes: as in the recipe; None: auto.
            say: tells the user a line.
        """
        self.bulletin, self.run_dir, self.say = bulletin, run_dir, say
        self.watch = hangs.Watch(num_workers, hang_minutes)
        self.looked_s = time.monotonic()

    def look(self) -> None:
        """Look now and then; where workers hang, find out which, write it down, and end them all."""
        now_s = time.monotonic()
        if now_s - self.looked_s < LOOK_EVERY_S:
            return
        self.looked_s = now_s
        try:
            beats = ray.get(self.bulletin.beats.remote(), timeout=NODE_WITHIN_S)
        except ray.exceptions.RayError as error:  # A time-out is one, where the machine is busy.
            logging.getLogger(__name__).warning("heartbeats: %s", error)
            return  # Time that nobody looks at does not count.
        if (hang := self.watch.look(time.monotonic(), beats)) is not None:
            self._end(hang)

    def _end(self, hang: hangs.Hang) -> None:
        answers = on_nodes(hang.beats, lambda mine: (processes.look, self._asked(mine)))
        seen = {rank: each for answer in answers for rank, each in answer.items()}
        told = hangs.message(hang, seen)
        now = ray.get(self.bulletin.beats.remote())
        if any(_differs(beat, now.get(rank)) for rank, beat in hang.beats.items()):
            return  # They go on after all, or have failed by themselves and are being replaced.
        line = f"{told} (stacks: {self._write(hang, told, seen)})"
        self.say(f"the workers hang: {line}")
        # Before their end: Ray Train then asks at once what is to be done about it.
        ray.get(self.bulletin.found.remote(line, hang.place.stage, hang.place.step))
        # By Ray Train's own means a stopped process takes a minute, and the others of its group wait for it.
        on_nodes(hang.beats, lambda mine: (processes.end, [beat.process for beat in mine]))

    def _asked(self, beats: list[Beat]) -> dict[int, tuple[Process, str]]:
        return {beat.rank: (beat.process, str(stacks_file(self.run_dir, beat.rank))) for beat in beats}

    def _write(self, hang: hangs.Hang, told: str, seen: dict[int, Seen]) -> str:
        """Keep what was found, also in the record; return the file, or why there is none: workers may hang on a full disk."""
        folder = self.run_dir / "hangs"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{len(list(folder.iterdir())) + 1}.txt"
            storage.write_text(path, hangs.report(hang, told, seen))
            recorder, place = Recorder(self.run_dir / "metrics.jsonl"), hang.place
            recorder.write("hang", message=told, stacks=str(path), stage=place.stage, step=place.step)
            recorder.close()
        except OSError as error:
            return f"not written: {error}"
        return str(path)


def _differs(beat: Beat, now: Beat | None) -> bool:
    return now is None or (now.process, now.place) != (beat.process, beat.place)


def on_nodes(
    beats: Mapping[int, Beat], work: Callable[[list[Beat]], tuple[Callable[[Any], T], Any]]
) -> list[T]:
    """Have the nodes of workers do something, all at once; return what came back from those that did it in time.

    Args:
        beats: of the workers.
        work: returns a function and its argument, for the workers of one node.
    """
    by_node: dict[str, list[Beat]] = defaultdict(list)
    for beat in beats.values():
        by_node[beat.node].append(beat)
    pending = []
    for node, mine in by_node.items():
        function, argument = work(mine)
        # It needs no CPU: the workers have them all. Not soft: elsewhere it would find other processes.
        task = ray.remote(num_cpus=0, max_retries=0)(function)
        strategy = NodeAffinitySchedulingStrategy(node, soft=False)
        pending.append(task.options(scheduling_strategy=strategy).remote(argument))
    done, late = ray.wait(pending, num_returns=len(pending), timeout=NODE_WITHIN_S)
    for each in late:
        ray.cancel(each, force=True)
    results = []
    for each in done:
        try:
            results.append(ray.get(each))
        except ray.exceptions.RayError:
            continue  # The node is gone: Ray tells of its workers by itself.
    return results
