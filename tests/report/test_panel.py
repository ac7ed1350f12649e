"""The curve and the panel, as text in terminals of several widths."""

import math
import random

import pytest
from rich.console import Console

from launcher.report import curve
from launcher.report.panel import panel
from launcher.report.progress import Progress
from tests.report.events import BEGIN_S, begin, run, step

NAMES = ("source", "a-target-with-quite-a-long-name", "baseline")


def progress(num_steps: int = 40) -> Progress:
    draw, found = random.Random(0), Progress()
    memory = {"device": 64 << 30, "host": 8 << 30}
    stages = [{"name": name, "num_steps": 100, "memory": memory, "forecast_s": 1.0} for name in NAMES]
    found.take(run(*stages, save_steps=25))
    found.take(begin(NAMES[1], flops_per_token=1e9, peak_flops=1e12))
    for n in range(1, num_steps + 1):
        found.take(step(n, NAMES[1], loss=5 / n + draw.random() / 10))
    told = {"kind": "eval", "time": BEGIN_S, "stage": NAMES[1], "step": 25}
    found.take(told | {"metrics": {"exact_match": 0.51234, "f1": 0.6, "loss": 1.5}})
    spent = {"tokens": 1, "slots": 2, "data_s": 0.1, "step_s": 1.0, "stall_s": 0.1}
    memory = {"device": 61 << 30, "host": 7 << 30}
    found.take({"kind": "usage", "time": BEGIN_S, "memory": memory, "spent": spent})
    return found


def drawn(found: Progress, width: int, *, is_plain: bool = False) -> list[str]:
    console = Console(width=width, color_system=None, force_terminal=True, legacy_windows=False)
    with console.capture() as capture:
        console.print(panel(found, BEGIN_S + 41, width, is_plain=is_plain))
    return capture.get().splitlines()


@pytest.mark.parametrize("width", [34, 60, 80, 120, 200])
def test_every_line_is_as_wide_as_the_terminal(width: int) -> None:
    for found in (progress(), progress(1), Progress()):
        lines = drawn(found, width)
        assert {len(line) for line in lines} == {width}
        assert lines[0][0] == "╭" and lines[-1][-1] == "╯"


def test_all_that_is_known_is_there() -> None:
    text = "\n".join(drawn(progress(), 80))
    for part in (
        "40/100  40%",
        "exact_match 0.5123 · f1 0.6000",
        "100 tokens/s · 8.0 samples/s · MFU 5.0% · lr 1.00e-04",
        "GPU 61.0 GiB of 64.0 GiB predicted",
        "host 7.0 GiB of 8.0 GiB predicted",
        "data 10.0% · checkpoints",
        "padding 50.0%",
        "next at step 50 in 0:10",
        "2 workers on 1 node · no restarts",
        "1:00 of this stage · about 4:20 of the run",
    ):
        assert part in text, text


def test_a_terminal_without_unicode_gets_plain_characters() -> None:
    for found in (progress(), progress(1)):
        text = "\n".join(drawn(found, 60, is_plain=True)).replace("━", "").replace("╺", "").replace("╸", "")
        assert text.isascii(), text


def test_a_silent_run_says_since_when() -> None:
    found = progress()
    assert "no step for" not in "\n".join(drawn(found, 80))
    found.take({"kind": "failure", "time": BEGIN_S, "reason": "gone"})
    assert "the workers are started again" in "\n".join(drawn(found, 80))
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(panel(progress(), BEGIN_S + 100, 80))
    assert "no step for 1:00" in capture.get()


def test_a_curve_falls_from_the_upper_left_to_the_lower_right() -> None:
    rows = curve.braille([4.0, 3.0, 2.0, 1.0], 2, 1)
    assert rows == [chr(0x2800 + 0x01 + 0x10) + chr(0x2800 + 0x04 + 0x80)]
    assert curve.plain([1.0, 2.0, 3.0], 3) == ["_-^"]
    assert curve.plain([1.0, math.nan, 3.0], 3) == ["_ ^"]
    assert curve.plain([2.0], 3) == ["___"] and curve.braille([], 2, 1) == ["⠀⠀"]
    assert curve.resampled([1.0, 3.0, 5.0, 7.0], 2) == [2.0, 6.0]
