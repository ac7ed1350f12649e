"""A worker's heartbeat: a thread that tells the driver where training is, without training waiting for it."""

import logging
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.exceptions

from launcher import processes
from launcher.hangs import BEATS_EVERY_S
from launcher.pulse import Beat, Place, Pulse

_ANSWER_S = 30.0


def stacks_file(run_dir: Path, rank: int) -> Path:
    """Return where a rank writes the stacks of its threads when it is asked to."""
    return run_dir / "logs" / f"stacks-rank-{rank}.txt"


@contextmanager
def beating(bulletin: str, rank: int, run_dir: Path) -> Iterator[Pulse]:
    """Send heartbeats until the block ends; yield what they tell, for training to assign.

    Args:
        bulletin: the actor's name.
        rank: of this worker.
        run_dir: of the run.
    """
    pulse, ended = Pulse(), threading.Event()
    processes.show_on_signal(stacks_file(run_dir, rank))
    arguments = (ray.get_actor(bulletin), rank, pulse, ended)
    thread = threading.Thread(target=_beat, args=arguments, daemon=True, name="heart")
    thread.start()
    try:
        yield pulse
    finally:
        pulse.phase = "done"
        ended.set()
        thread.join(_ANSWER_S)


def _beat(bulletin: Any, rank: int, pulse: Pulse, ended: threading.Event) -> None:
    host, node, me = socket.gethostname(), ray.get_runtime_context().get_node_id(), processes.this()
    number, is_last = 0, False
    while not is_last:
        is_last = ended.wait(BEATS_EVERY_S if number else 0)
        number += 1
        place = Place(pulse.num_begun, pulse.stage, pulse.step, pulse.phase, pulse.tick)
        try:
            # One at a time: heartbeats must not pile up where the driver's machine is slow.
            ray.get(bulletin.beat.remote(Beat(rank, host, node, me, number, place)), timeout=_ANSWER_S)
        except ray.exceptions.GetTimeoutError:
            logging.getLogger(__name__).warning("heartbeat %d had no answer (pid %d)", number, os.getpid())
        except ray.exceptions.RayError:
            return  # The driver is gone, and this process goes with it.
