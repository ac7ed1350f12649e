"""What a person sees: plain lines in a log, one live line on a terminal."""

import io

from launcher.report.view import View


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _events(num_steps: int) -> list[dict]:
    begin = {
        "kind": "stage_begin",
        "stage": "source",
        "start": 0,
        "num_steps": num_steps,
        "units_per_step": 8,
        "unit": "samples",
    }
    values = {"kind": "step", "stage": "source", "lr": 1e-4, "samples": 8, "tokens": 100, "slots": 125}
    values |= {"step_s": 1.0, "data_s": 0.01}
    steps = [values | {"step": n, "loss": 1.0 / n, "time": 100.0 + n} for n in range(1, num_steps + 1)]
    return [
        begin,
        *steps,
        {"kind": "eval", "stage": "source", "step": num_steps, "metrics": {"accuracy": 0.5}},
    ]


def test_plain_lines() -> None:
    stream = io.StringIO()
    view = View(stream)
    for event in _events(5):
        view.show(event)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "stage source: 5 steps of 8 samples"
    assert lines[-2] == (
        "source  step 5/5  loss 0.2000  lr 1.00e-04  8 samples/s  100 tokens/s"
        "  padding 20.0%  data wait 1.0%  0:00 left"
    )
    assert lines[-1] == "source  step 5  eval: accuracy 0.5000"
    assert len(lines) == 4


def test_one_live_line_is_closed_before_the_next() -> None:
    stream = Terminal()
    view = View(stream)
    for event in _events(3):
        view.show(event)
    assert stream.getvalue().count("\r") == 2
    assert "left\nsource  step 3  eval" in stream.getvalue()


def test_the_preparation_is_shown_until_training_begins() -> None:
    stream = io.StringIO()
    view = View(stream)
    event = {"kind": "preparation", "store": "source", "done": 3, "chunks": 10, "tokens": 3000}
    event |= {"bad": 2, "seconds": 2.0, "is_whole": False}
    view.show(event)
    assert stream.getvalue() == "preparing source: 3/10 chunks, 3,000 tokens, 1,500 tokens/s, 2 bad rows\n"
    for each in _events(1):
        view.show(each)
    before = stream.getvalue()
    view.show(event)
    assert stream.getvalue() == before


def test_unknown_events_are_passed_over() -> None:
    stream = io.StringIO()
    View(stream).show({"kind": "something new"})
    assert stream.getvalue() == ""
