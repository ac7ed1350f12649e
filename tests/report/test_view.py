"""What a person sees: plain lines in a log, a panel on a terminal."""

import io
import sys
import time

from launcher.report.view import View
from tests.report.events import begin, step
from tests.terminals import in_terminal, without_codes


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _events(num_steps: int) -> list[dict]:
    steps = [step(n) for n in range(1, num_steps + 1)]
    evaluated = {"kind": "eval", "time": 1100.0, "stage": "source", "step": num_steps}
    return [begin(num_steps=num_steps), *steps, evaluated | {"metrics": {"accuracy": 0.5}}]


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


def test_what_a_record_tells_more_is_in_plain_lines_too() -> None:
    stream = io.StringIO()
    view = View(stream)
    view.show(begin(num_steps=2, flops_per_token=1e9, peak_flops=1e11))
    view.show(step(1))
    view.show(step(2))
    saved = {"kind": "checkpoint", "time": 1002.0, "stage": "source", "step": 2, "bytes": 3 << 20}
    view.show(saved | {"stall_s": 0.25, "save_s": 1.0})
    view.show(saved | {"stall_s": 0.25, "save_s": 1.0})
    spent = {"tokens": 200, "slots": 250, "data_s": 0.02, "step_s": 2.0, "stall_s": 0.5}
    memory = {"device": 2 << 30, "host": 1 << 30}
    view.show(
        {"kind": "usage", "time": 1002.0, "stage": "source", "step": 2, "memory": memory, "spent": spent}
    )
    lines = stream.getvalue().splitlines()
    # 100 tokens/s of 1e9 FLOPs each are a tenth percent of two peaks of 1e11.
    assert "  MFU 50.0%  0:00 left" in lines[2]
    assert lines[3:] == [
        "source: checkpoint of step 2, 3.0 MiB, training stood still for 0.25 s",
        "source: memory of a worker: GPU 2.0 GiB, host 1.0 GiB; checkpoints took 20.0% of the time",
    ]


def test_the_panel_is_taken_away_and_lines_stay() -> None:
    stream = Terminal()
    view = View(stream)
    for event in _events(3):
        view.show(event)
    time.sleep(0.5)
    view.show(_events(3)[-1])
    view.end_line()
    shown = stream.getvalue()
    assert "\x1b[?25h" in shown, "the cursor is shown again"
    assert shown.count("source  step 3  eval: accuracy 0.5000") == 2
    assert "3/3 100%" in shown and "0.3333" in shown
    view.say("after")
    assert stream.getvalue().endswith("after\n")


def test_a_terminal_that_can_do_nothing_gets_plain_lines(monkeypatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    view = View(stream)
    for event in _events(3):
        view.show(event)
    assert "\x1b" not in stream.getvalue() and "loss 0.3333" in stream.getvalue()


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


CHATTY = """
import os, sys, time
from launcher.report.view import View
from tests.report.events import begin, step
view = View()
view.show(begin())
for n in range(1, 5):
    view.show(step(n))
    os.write(2, b"chatter of a library %d\\n" % n)
    print("a print", n)
    time.sleep(0.4)
os.write(1, b"the last, without an end")
view.end_line()
print()
print("after")
"""


def test_what_libraries_write_does_not_tear_the_panel() -> None:
    text = in_terminal([sys.executable, "-c", CHATTY], columns=60)
    shown = without_codes(text)
    # What is printed where the panel ended comes behind its last line here.
    said = [line.rpartition("╯")[2].strip("\r") for line in shown]
    for n in range(1, 5):
        assert f"chatter of a library {n}" in said and f"a print {n}" in said, text
    assert said[-4:] == ["the last, without an end", "after", "", "exit code 0"]
    # Every line of the panel is as wide as the others, with room for ^C behind: none was continued by something else.
    drawn = [line for line in shown if line.startswith(("╭", "│"))]
    assert len(drawn) > 20 and all(len(line) == 58 for line in drawn)


_BREAKS = """
import sys, time
from launcher.report.screen import Screen
from rich.text import Text
from launcher.report import panel
class Odd:
    def __rich_console__(self, *_):
        raise KeyError("odd")
panel.panel = lambda *_, **__: Odd() if len(said) == 2 else Text("the panel")
said = ["before"]
screen = Screen(sys.stdout, lambda: None)
screen.say("before")
time.sleep(0.5)
said.append("after")
screen.is_stale = True
time.sleep(0.5)
screen.say("verdict: while it lasts")
time.sleep(0.5)
assert screen.thread.is_alive()
screen.say("verdict: the last line")
screen.close()
print("after all")
"""


def test_a_panel_that_cannot_be_drawn_takes_nothing_with_it() -> None:
    text = in_terminal([sys.executable, "-c", _BREAKS], columns=100)
    lines = [line.split("\r")[-1] for line in without_codes(text)]
    for line in ("before", "verdict: while it lasts", "verdict: the last line", "after all", "exit code 0"):
        assert line in lines, text
    assert sum("the panel cannot be drawn any more: KeyError" in line for line in lines) == 1
