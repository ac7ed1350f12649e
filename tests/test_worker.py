"""A rank's life, as far as it goes without Ray."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from launcher import worker


def test_an_event_that_cannot_be_posted_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []

    def post(event: dict[str, Any]) -> None:
        if event.get("odd"):
            raise TypeError("cannot be sent")
        told.append(event)

    actor = SimpleNamespace(post=SimpleNamespace(remote=post))
    monkeypatch.setattr(worker.ray, "get_actor", lambda _: actor)
    listen = worker._listener("bulletin")
    events = [{"kind": "eval", "odd": True}, {"kind": "eval"}, {"kind": "checkpoint"}]
    talk = threading.Thread(target=lambda: [listen(event) for event in events], daemon=True)
    talk.start()
    talk.join(10)
    assert not talk.is_alive(), "it waits for ever"
    assert told == events[1:]
