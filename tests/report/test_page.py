"""The page of a run, read back as a browser's parser sees it."""

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from launcher import afterwards, listing, runs
from launcher.errors import BadInput
from launcher.report import comparison, page, past, sections
from tests.report.directories import RECIPE, T0, killed_run, write
from tests.report.parsed import Parsed

EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)>'


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return killed_run(tmp_path / "run", monkeypatch)


def _parsed(run_dir: Path) -> Parsed:
    told = Parsed(page.write(past.read(run_dir)).read_text(encoding="utf-8"))
    assert "Left out" not in told.text
    return told


def test_the_page_tells_the_run(run_dir: Path) -> None:
    told = _parsed(run_dir)
    assert told.sections == ["stages", "curves", "ledger", "events", "plan", "how", "environment"]
    for words in (
        "Done",
        "0.9000 accuracy",
        "3 steps trained again",
        "rank 1 failed: worker died <b>badly</b>",
        "training again after 10.0 s, from step 5 of chat",
        "3 steps were trained again after workers began anew",
        "2 checkpoints",
        "host memory of a worker 2.0 GiB 3.0 GiB 1.50 x",
        "rows to train on 80",
        "tokens a second 800",
        "of the devices' peak 40.0 %",
        "learning_rate: 0.001",
        "torch 2.9",
        "node-1",
    ):
        assert words in told.text, words


def test_the_ledger_on_the_page_adds_up(run_dir: Path) -> None:
    lines = dict(_parsed(run_dir).seconds())
    whole = lines.pop(None)
    assert sum(lines.values()) == pytest.approx(whole, abs=0.001 * len(lines))
    assert whole == pytest.approx(60.75)
    assert lines["lost"] == pytest.approx(3.0)


def test_the_page_needs_no_network_and_shows_by_day_and_by_night(run_dir: Path) -> None:
    text = page.write(past.read(run_dir)).read_text(encoding="utf-8")
    for _, attributes in Parsed(text).tags:
        assert "src" not in attributes and "srcset" not in attributes
        assert (attributes.get("href") or attributes.get("xlink:href") or "#").startswith("#")
    assert "@import" not in text and not re.findall(r"url\((?!#)", text)
    assert "prefers-color-scheme: dark" in text
    # Every colour of the charts is the style sheet's, so that it can change.
    charts = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.S))
    assert charts and not re.findall(r"#[0-9a-fA-F]{6}", charts)
    assert "var(--series-0)" in charts and "var(--kind-lost)" in charts
    used = {name for name in re.findall(r"var\((--[\w-]+)", text) if name not in ("--part", "--series-")}
    assert used <= set(re.findall(r"(--[\w-]+):", text))


def test_curves_hold_each_step_once_and_lost_work_aside(run_dir: Path) -> None:
    text = page.write(past.read(run_dir)).read_text(encoding="utf-8")
    points = [
        json.loads(each) for each in re.findall(r'<script type="application/json">(.*?)</script>', text)
    ]
    (loss,) = [each for each in points if each["series"][0]["name"] == "loss"]
    by_name = {series["name"]: series for series in loss["series"]}
    assert by_name["loss"]["x"] == list(range(1, 21))
    assert by_name["loss, trained again later"]["x"] == [6, 7, 8]
    assert by_name["loss in evaluation"]["x"] == [10, 20]


def test_memory_that_is_told_now_and_then_is_drawn(run_dir: Path) -> None:
    with open(run_dir / "metrics.jsonl", "a", encoding="utf-8") as record:
        for step, gib in ((5, 2), (12, 3)):
            told = {"kind": "usage", "time": T0 + 40, "stage": "chat", "step": step}
            record.write(json.dumps(told | {"memory": {"device": None, "host": gib << 30}}) + "\n")
    text = page.write(past.read(run_dir)).read_text(encoding="utf-8")
    assert '{"name":"host memory of rank 0, GiB","colour":0,"x":[5.0,12.0],"y":[2.0,3.0]}' in text
    assert "GPU memory of rank 0" not in text


def test_what_users_wrote_is_text(run_dir: Path) -> None:
    recipe = json.loads(json.dumps(RECIPE))
    recipe["stages"][0]["data"]["prefix"] = EVIL
    write(run_dir, "recipe.yaml", recipe)
    sample = {"input": EVIL, "expected": EVIL, "answer": EVIL, "is_right": False, "score": 0.1}
    matrix = {"labels": [EVIL, "b"], "counts": [[3, 1], [0, 2]]}
    examples = {"task": EVIL, "num": 6, "of": 10, "matrix": matrix, "samples": [sample]}
    write(run_dir, "stages/chat/examples.json", examples)
    text = page.write(past.read(run_dir)).read_text(encoding="utf-8")
    told = Parsed(text)
    assert EVIL not in text and EVIL in told.text
    assert not [
        tag for tag, attributes in told.tags if tag == "img" or any(a.startswith("on") for a in attributes)
    ]
    assert len([tag for tag, _ in told.tags if tag == "script"]) == text.count('type="application/json"') + 1


def test_no_password_of_an_address_is_shown(run_dir: Path) -> None:
    recipe = json.loads(json.dumps(RECIPE))
    recipe["stages"][0]["data"]["train"] = "s3://KEY:hush@bucket/train.jsonl"
    write(run_dir, "recipe.yaml", recipe)
    text = page.write(past.read(run_dir)).read_text(encoding="utf-8")
    assert "hush" not in text and "s3://***@bucket/train.jsonl" in text


def test_no_secret_of_a_message_is_shown(run_dir: Path) -> None:
    secret = "s3://KEY:hush@bucket/a and https://h/x.csv?sig=hush"
    report = past.read(run_dir).report
    verdict = {**report["verdict"], "kind": "storage", "message": secret, "seen": [secret]}
    events = [*report["events"], {"kind": "failure", "time": report["begun"], "reason": secret, "ranks": [0]}]
    write(run_dir, "report.json", report | {"verdict": verdict, "events": events})
    write(run_dir, "ds.json", {"tensorboard": {"output_path": secret}})
    text = page.write(past.read(run_dir)).read_text(encoding="utf-8")
    assert "hush" not in text and text.count("https://h/x.csv?sig=***") >= 4


def test_stages_that_train_jointly_make_each_step_once(run_dir: Path) -> None:
    recipe = json.loads(json.dumps(RECIPE))
    recipe["stages"].insert(0, {**recipe["stages"][0], "name": "other"})
    recipe["transfer"] = "joint"
    write(run_dir, "recipe.yaml", recipe)
    write(run_dir, "stages/other/done.json", {"metrics": {}, "steps": 20})
    assert ("steps", "20", "") in sections.tiles(past.read(run_dir))


def test_the_page_and_the_list_tell_one_cost(run_dir: Path) -> None:
    told = past.read(run_dir)
    write(run_dir, "plan.json", told.plan | {"cluster": {"price_per_hour": 3600.0}})
    write(run_dir, "report.json", told.report | {"earlier": [{"seconds": 100.0}]})
    told = past.read(run_dir)
    (shown,) = [value for name, value, _ in sections.tiles(told) if name == "cost"]
    listed = runs.as_json(listing.look(run_dir, run_dir.parent))["cost"]
    whole_s = 100 + told.report["ended"] - told.report["startup"]["begun"]
    assert shown == f"{listed:,.2f}" == f"{whole_s:,.2f}", "with the start of the process"
    assert dict(comparison.compare([told, told]).tables[0].rows)["cost"] == [shown, shown]


def test_answers_right_and_wrong_are_shown(run_dir: Path) -> None:
    samples = [
        {
            "input": f"question {i}",
            "expected": "a",
            "answer": "ab"[i % 2],
            "is_right": i % 2 == 0,
            "score": 0.5,
        }
        for i in range(9)
    ]
    matrix = {"labels": ["a", "b"], "counts": [[5, 4], [1, 90]]}
    entities = [
        {"type": "PER", "expected": 9, "found": 8, "right": 7, "precision": 0.875, "recall": 0.778, "f1": 0.8}
    ]
    examples = {"task": "text-classification", "num": 100, "of": 2000, "samples": samples}
    write(run_dir, "stages/chat/examples.json", examples | {"matrix": matrix, "entities": entities})
    told = _parsed(run_dir)
    assert "answers" in told.sections
    assert "4 wrong answers" in told.text and "5 right answers" in told.text
    assert "out of 100 of 2,000 evaluation samples" in told.text
    assert "a 5 4 55.6 %" in told.text and "b 1 90 98.9 %" in told.text
    assert "PER 9 8 7 0.8750 0.7780 0.8000" in told.text


def test_of_many_labels_those_that_are_confused_most_are_shown(run_dir: Path) -> None:
    labels = [f"label {i}" for i in range(40)]
    counts = [[10 if i == j else int((i, j) == (3, 7)) for j in range(40)] for i in range(40)]
    samples = [{"input": "x", "expected": "y", "answer": "z", "is_right": None, "score": None}]
    examples = {
        "task": "text-classification",
        "matrix": {"labels": labels, "counts": counts},
        "samples": samples,
    }
    write(run_dir, "stages/chat/examples.json", examples)
    told = _parsed(run_dir)
    assert "label 3 label 7 1" in told.text and "label 8" not in told.text


@pytest.mark.parametrize(
    "missing",
    ["report.json", "metrics.jsonl", "plan.json", "summary.json", "recipe.yaml", "ds.json", "stages"],
)
def test_what_is_missing_leaves_its_section_out(run_dir: Path, missing: str) -> None:
    path = run_dir / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    gone = {"metrics.jsonl": {"curves"}, "plan.json": {"plan"}, "recipe.yaml": {"how"}}.get(missing, set())
    assert gone == {"stages", "curves", "ledger", "events", "plan", "how", "environment"} - set(
        _parsed(run_dir).sections
    )


def test_each_file_alone_gives_a_page(run_dir: Path, tmp_path: Path) -> None:
    for name in ("report.json", "metrics.jsonl", "recipe.yaml"):
        alone = tmp_path / f"only-{name}"
        alone.mkdir()
        shutil.copy(run_dir / name, alone)
        assert _parsed(alone).text
    with pytest.raises(BadInput, match="give the directory of a run"):
        page.write(past.read(tmp_path))


def test_a_file_of_another_shape_costs_its_section_only(run_dir: Path) -> None:
    write(
        run_dir,
        "stages/chat/examples.json",
        {"task": "x", "samples": [], "matrix": {"labels": ["a"], "counts": 7}},
    )
    told = Parsed(page.write(past.read(run_dir)).read_text(encoding="utf-8"))
    assert "Left out" in told.text and "answers of chat" in told.text
    assert told.sections == ["stages", "curves", "ledger", "events", "plan", "how", "environment"]


def test_a_page_that_cannot_be_written_fails_nothing(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(run_dir, "report.json", {"verdict": 7, "earlier": 8})
    assert afterwards.tell(run_dir) is None
    assert "report.html cannot be written" in caplog.text


def test_a_driver_that_is_gone_is_told(run_dir: Path) -> None:
    report = past.read(run_dir).report
    running = {"kind": "running", "host": "elsewhere", "pid": 1}
    write(run_dir, "report.json", report | {"verdict": running, "ended": None})
    os.utime(run_dir / "report.json", (time.time(), time.time()))  # By the clock of the record.
    assert "Not ended yet" in _parsed(run_dir).text
    os.utime(run_dir / "report.json", (1e9, 1e9))
    assert "The driver ended without a word" in _parsed(run_dir).text, "on another host, and long silent"
    import socket

    process = subprocess.Popen(["true"])
    process.wait()
    gone = running | {"host": socket.gethostname(), "pid": process.pid}
    write(run_dir, "report.json", report | {"verdict": gone, "ended": None})
    assert "The driver ended without a word" in _parsed(run_dir).text


@pytest.mark.slow
def test_a_long_run_gives_a_small_page(tmp_path: Path) -> None:
    step = {
        "kind": "step",
        "stage": "a",
        "gradient_norm": 1.0,
        "lr": 1e-4,
        "tokens": 9,
        "samples": 1,
        "step_s": 0.5,
    }
    with open(tmp_path / "metrics.jsonl", "w") as file:
        file.write(
            '{"kind": "stage_begin", "time": 0, "stage": "a", "start": 0, "num_workers": 8, "num_steps": 200000}\n'
        )
        for i in range(1, 200_001):
            file.write(json.dumps({**step, "time": i / 2, "step": i, "loss": 1 / i, "data_s": 0.0}) + "\n")
            if i % 100 == 0:
                file.write(
                    json.dumps(
                        {"kind": "eval", "time": i / 2, "stage": "a", "step": i, "metrics": {"loss": 1}}
                    )
                    + "\n"
                )
    assert page.write(past.read(tmp_path)).stat().st_size < 1_000_000


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_shows_the_value_under_the_cursor(run_dir: Path, tmp_path: Path) -> None:
    text = page.write(past.read(run_dir)).read_text(encoding="utf-8")
    probe = """<script>
    const plot = document.querySelector("figure.chart .plot"), box = plot.getBoundingClientRect();
    const at = { clientX: box.left + box.width * 0.6, clientY: box.top + 20 };
    plot.dispatchEvent(new PointerEvent("pointermove", at));
    document.title = `${document.documentElement.scrollWidth <= innerWidth} ${document.getElementById("tip").textContent}`;
    </script></body>"""
    probed = tmp_path / "probed.html"
    probed.write_text(text.replace("</body>", probe), encoding="utf-8")
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=500,900",
        "--dump-dom",
    ]
    command += [f"--user-data-dir={tmp_path / 'profile'}", probed.as_uri()]
    seen = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    title = re.search(r"<title>(.*?)</title>", seen)
    assert title is not None
    # Nothing sticks out on a narrow screen; and the loss at step 12 is 2 / 12.
    assert re.search(r"true .*loss\s+0\.1\d+\s+at 1[12]", title[1]), title[1]
