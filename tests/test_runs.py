"""The runs of a run root: listed as they are; freed, but never what somebody needs."""

import json
import os
import shutil
import socket
import sys
import time
from pathlib import Path

import filelock
import pytest

from launcher import cleaning, describe, listing, runs, storage, watch
from launcher import recipe as recipes
from launcher.errors import RunExists
from launcher.report import past
from tests.run_files import age, checkpoint, files, make

PROCESS = {"host": socket.gethostname(), "pid": os.getpid()}


def states(root: Path) -> dict[str, str]:
    return {run.name: run.state for run in listing.all_in(root)}


def test_every_state_is_told(tmp_path: Path) -> None:
    make(tmp_path, "good", "done")
    make(tmp_path, "bad", "worker lost")
    make(tmp_path, "halted", "stopped by the user")
    make(tmp_path, "gone", "running", host="elsewhere", pid=1)
    make(tmp_path, "many-seeds/seed-0", "done")
    # A process with that number is there, but it began after the run.
    make(tmp_path, "number-given-again", "running", **PROCESS)
    here = make(tmp_path, "here", "running", **PROCESS)
    report = json.loads((here / "report.json").read_text())
    storage.write_json(here / "report.json", report | {"begun": time.time()})
    age(here)
    make(tmp_path, "fresh", "running", host="elsewhere", pid=1)
    os.utime(tmp_path / "fresh" / "report.json")
    (tmp_path / "only-a-plan").mkdir()
    assert states(tmp_path) == {
        "good": "done",
        "bad": "failed",
        "halted": "stopped",
        "gone": "driver lost",
        "many-seeds/seed-0": "done",
        "number-given-again": "driver lost",
        "here": "running",
        "fresh": "running",
    }


def test_the_list_and_its_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path, "good", "done", steps=7)
    make(tmp_path, "bad", "worker lost")
    assert runs.main(["--run-root", str(tmp_path), "--json"]) == 0
    good, bad = json.loads(capsys.readouterr().out)
    assert (good["name"], good["state"], good["metric"]) == ("good", "done", {"source f1": 0.75})
    assert (bad["stage"], bad["step"], bad["num_steps"]) == ("source", 3, 100)
    assert bad["metric"] == {"train loss": 1 / 3}
    assert good["seconds"] == 300 and good["cost"] == 3.0, "all tries, at 36 an hour"
    assert good["bytes"]["checkpoints"] == 2 * (1000 + 3) and good["bytes"]["exports"] == 500
    assert runs.main(["--run-root", str(tmp_path)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[1].split()[:3] == ["RUN", "STATE", "AT"]
    assert "failed (worker lost)  source 3/100" in shown[3] and "5:00  3.00" in shown[3]
    assert runs.main(["--run-root", str(tmp_path / "none")]) == 2
    assert "there is no such directory" in capsys.readouterr().err
    with pytest.raises(RunExists, match="godo: no run directory, nor a run in .*did you mean .good"):
        listing.find("godo", [tmp_path])


def test_a_run_is_found_by_name_by_path_and_among_seeds(tmp_path: Path) -> None:
    make(tmp_path / "root", "one", "done")
    make(tmp_path / "root", "many-seeds/seed-0", "done")
    make(tmp_path / "root", "many-seeds/seed-1", "worker lost")
    make(tmp_path / "root", "many-seeds/seed-1.old-1", "worker lost")
    elsewhere = make(tmp_path, "elsewhere", "done")
    places = [tmp_path / "root"]
    assert listing.find("one", places).name == "one"
    assert listing.find("many-seeds", places).name == "many-seeds/seed-1"
    assert listing.find(str(tmp_path / "root" / "many-seeds" / "seed-0"), places).name == "many-seeds/seed-0"
    assert listing.find(str(elsewhere), places).path == elsewhere
    before = files(tmp_path / "root")
    assert runs.main(["clean", "--run-root", str(places[0]), "--yes", str(elsewhere)]) == 0
    assert files(tmp_path / "root") == before and not list(elsewhere.glob("stages/*/checkpoints"))


def test_clean_says_first_and_deletes_only_with_yes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path, "good", "done")
    before = files(tmp_path)
    assert runs.main(["clean", "--run-root", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "checkpoints of a finished run" in said and "nothing was deleted: --yes" in said
    assert files(tmp_path) == before
    assert runs.main(["clean", "--run-root", str(tmp_path), "--yes"]) == 0
    assert "freed 2.0 KiB" in capsys.readouterr().out
    gone = before - files(tmp_path)
    assert len(gone) == 4 and all("/checkpoints/" in name for name in gone)
    assert runs.main(["clean", "--run-root", str(tmp_path), "--yes"]) == 0
    assert "nothing to free" in capsys.readouterr().out


def test_an_unfinished_runs_checkpoints_stay_and_its_leftovers_go(tmp_path: Path) -> None:
    for kind in ("worker lost", "stopped by the user", "storage"):
        run_dir = make(tmp_path, kind.replace(" ", "-"), kind)
        half = run_dir / "stages" / "source" / "checkpoints" / "step-00000015"
        storage.write_text(half / "rank-00000.safetensors", "h" * 10)
        damaged = run_dir / "stages" / "source" / "checkpoints" / "step-00000012"
        storage.write_text(damaged / "damaged.json", "{}")
        storage.write_text(run_dir / "stages" / "source" / ".export.0a1b2c3d" / "model", "x")
        storage.write_text(run_dir / ".report.json.0a1b2c3d", "x")
        storage.write_text(run_dir / ".hidden-by-the-user", "x")
        age(run_dir)
    before = files(tmp_path)
    assert runs.main(["clean", "--run-root", str(tmp_path), "--yes"]) == 0
    gone = before - files(tmp_path)
    assert {name.split("/", 1)[1] for name in gone} == {
        "stages/source/checkpoints/step-00000015/rank-00000.safetensors",
        "stages/source/.export.0a1b2c3d/model",
        ".report.json.0a1b2c3d",
    }
    assert len(gone) == 9


@pytest.mark.parametrize("host", [socket.gethostname(), "elsewhere"])
def test_nothing_of_a_run_that_may_go_on_is_touched(
    tmp_path: Path, host: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = make(tmp_path, "going", "running", host=host, pid=os.getpid())
    report = json.loads((run_dir / "report.json").read_text())
    storage.write_json(run_dir / "report.json", report | {"begun": time.time()})
    storage.write_text(run_dir / "stages" / "source" / "checkpoints" / "step-00000015" / "rank", "h")
    # Longer silent than a driver that lives should be, but not for long enough to be sure from here.
    age(run_dir, 600)
    before = files(tmp_path)
    assert runs.main(["clean", "--run-root", str(tmp_path), "--yes", "going"]) == 0
    assert files(tmp_path) == before
    assert "kept: going: " in capsys.readouterr().out


def test_a_run_that_goes_on_by_now_is_not_freed(tmp_path: Path) -> None:
    run_dir = make(tmp_path, "good", "done")
    items, _ = cleaning.plan(tmp_path, listing.all_in(tmp_path), named=(), older_than_s=0, keep_exports=False)
    (run_dir / "summary.json").unlink()
    make(tmp_path, "good", "running", **PROCESS)
    os.utime(run_dir / "report.json")
    assert not any(cleaning.free(item, tmp_path) for item in items)
    assert len(list(run_dir.glob("stages/*/checkpoints/step-*/commit.json"))) == 2


def test_old_directories(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path, "it.old-1", "done")
    make(tmp_path, "it.old-2", "worker lost")
    root = ["--run-root", str(tmp_path)]
    assert runs.main(["clean", *root, "--yes", "--older-than", "11"]) == 0
    assert set(os.listdir(tmp_path)) == {"it.old-1", "it.old-2"}
    copy = shutil.copytree(tmp_path, tmp_path.parent / "copy")
    age(copy)
    assert runs.main(["clean", "--run-root", str(copy), "--yes", "--keep-exports"]) == 0
    assert (copy / "it.old-1/stages/source/export/model.safetensors").exists()
    assert not list(copy.glob("it.old-1/stages/*/checkpoints"))
    assert runs.main(["clean", *root, "--yes"]) == 0
    assert "it.old-2: an old run that is unfinished: name it to free it" in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["it.old-2"]
    assert runs.main(["clean", *root, "--yes", "it.old-2"]) == 0
    assert os.listdir(tmp_path) == []


def store(root: Path, name: str) -> Path:
    folder = root / ".store" / name
    storage.write_text(folder / "meta.json", "{}")
    storage.write_text(folder / ".lock", "")
    age(folder)
    return folder


def test_stores_that_no_unfinished_run_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path, "good", "done", stores=["tokens-a", "tokens-b"])
    unfinished = make(tmp_path, "bad", "worker lost", stores=["tokens-b", "model-b"])
    for name in ("tokens-a", "tokens-b", "tokens-c", "model-a", "model-b", "other-thing"):
        store(tmp_path, name)
    (tmp_path / ".store" / "tokens-c" / ".used").touch()
    root = ["--run-root", str(tmp_path), "--yes"]
    # Somebody prepares data: whose run has no directory yet, so nobody knows what it needs.
    with filelock.FileLock(tmp_path / ".store" / "tokens-c" / ".lock"):
        assert runs.main(["clean", *root]) == 0
    assert "a run prepares its data now: none is freed" in capsys.readouterr().out
    assert len(os.listdir(tmp_path / ".store")) == 6
    (unfinished / "stores.json").rename(unfinished / "aside")
    age(tmp_path / ".store" / "tokens-a")
    assert runs.main(["clean", *root]) == 0
    assert "bad is unfinished and does not say which it needs" in capsys.readouterr().out
    (unfinished / "aside").rename(unfinished / "stores.json")
    assert runs.main(["clean", *root]) == 0
    assert set(os.listdir(tmp_path / ".store")) == {"tokens-b", "model-b", "tokens-c", "other-thing"}


def test_first_weights_below_an_adapter_stay(tmp_path: Path) -> None:
    run_dir = make(tmp_path, "good", "done")
    below, other = store(tmp_path, "model-a"), store(tmp_path, "model-b")
    config = {"base_model_name_or_path": str(below)}
    storage.write_json(run_dir / "stages/source/adapter/adapter_config.json", config)
    age(run_dir)
    assert runs.main(["clean", "--run-root", str(tmp_path), "--yes"]) == 0
    assert below.exists() and not other.exists()


def test_a_store_that_is_used_by_now_is_not_freed(tmp_path: Path) -> None:
    folder = store(tmp_path, "tokens-a")
    (item,), _ = cleaning.plan(tmp_path, [], named=(), older_than_s=0, keep_exports=False)
    (folder / ".used").touch()
    assert not cleaning.free(item, tmp_path) and (folder / "meta.json").exists()
    age(folder)
    assert cleaning.free(item, tmp_path) and not folder.exists()


def test_first_weights_are_marked_when_they_are_wanted(tmp_path: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config |= {"num_key_value_heads": 2, "intermediate_size": 8, "vocab_size": 32}
    stage = {"name": "chat", "task": "causal-lm", "data": {"train": "rows.jsonl"}}
    recipe = recipes.parse({"model": {"config": config, "tokenizer": "unused"}, "stages": [stage]})
    # Of the tokenizer only its length is asked.
    first = Path(describe._first_model(recipe, range(32), tmp_path / ".store"))
    age(first)
    assert describe._first_model(recipe, range(32), tmp_path / ".store") == str(first)
    items, _ = cleaning.plan(tmp_path, [], named=(), older_than_s=0, keep_exports=False)
    assert not items
    age(first)
    items, _ = cleaning.plan(tmp_path, [], named=(), older_than_s=0, keep_exports=False)
    assert [item.paths for item in items] == [(first,)]


def test_what_is_linked_from_another_run_frees_nothing(tmp_path: Path) -> None:
    checkpoint(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=os.link)
    assert cleaning.num_bytes([tmp_path / "a"]) == 0
    assert cleaning.num_bytes([tmp_path / "a", tmp_path / "b"]) == 1003


def test_odd_runs_are_a_line_each_and_hide_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path, "good", "done", steps=7)
    null = make(tmp_path, "null", "worker lost")
    report = json.loads((null / "report.json").read_text())
    storage.write_json(null / "report.json", report | {"events": None, "earlier": None, "verdict": None})
    storage.write_json(null / "plan.json", {"cluster": None, "stages": None})
    storage.write_text(null / "recipe.yaml", "stages:\n")
    no_begin = make(tmp_path, "no-begin", "worker lost")
    lines = (no_begin / "metrics.jsonl").read_text().splitlines(keepends=True)
    storage.write_text(no_begin / "metrics.jsonl", "".join(lines[1:]))
    binary = make(tmp_path, "binary", "worker lost")
    (binary / "report.json").write_bytes(b"\xff\xfe{")
    broken = make(tmp_path, "broken", "worker lost")
    storage.write_json(broken / "plan.json", [1])
    # As root no file is closed; a directory cannot be read as a file by anybody.
    closed = make(tmp_path, "closed", "worker lost")
    (closed / "report.json").unlink()
    (closed / "report.json").mkdir()
    age(tmp_path)
    assert runs.main(["--run-root", str(tmp_path)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in shown[2:6]} == {"good", "null", "no-begin", "binary"}
    assert sorted(line.split(": cannot be read: ")[0] for line in shown[6:]) == ["broken", "closed"]
    assert runs.main(["--run-root", str(tmp_path), "--json"]) == 0
    told = {run["name"]: run for run in json.loads(capsys.readouterr().out)}
    assert told["closed"]["state"] == "unreadable" and "Is a directory" in told["closed"]["error"]
    for name in ("null", "no-begin", "binary"):
        assert watch.main([name, "--run-root", str(tmp_path), "--once"]) != 0
        past.read(tmp_path / name)
    assert "error" not in capsys.readouterr().err
    assert watch.main(["closed", "--run-root", str(tmp_path)]) != 0
    assert "closed: cannot be read: " in capsys.readouterr().err
    before = files(closed)
    assert runs.main(["clean", "--run-root", str(tmp_path), "--yes", "closed"]) == 0
    assert "kept: closed: cannot be read: " in capsys.readouterr().out and files(closed) == before


@pytest.mark.parametrize(("end", "code"), [(EOFError, 0), (KeyboardInterrupt, 130)])
def test_a_prompt_that_is_left_deletes_nothing(
    tmp_path: Path,
    end: type[BaseException],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make(tmp_path, "good", "done")
    before = files(tmp_path)

    def leave(_: str) -> str:
        raise end

    monkeypatch.setattr("builtins.input", leave)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert runs.main(["clean", "--run-root", str(tmp_path)]) == code
    assert "nothing was deleted" in capsys.readouterr().out and files(tmp_path) == before


def test_what_may_not_be_deleted_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path, "good", "done")
    before = files(tmp_path)

    def refuse(self: Path, **_: bool) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "unlink", refuse)
    assert runs.main(["clean", "--run-root", str(tmp_path), "--yes"]) == 1
    assert "not freed: good: checkpoints of a finished run" in capsys.readouterr().out
    assert files(tmp_path) == before, "a checkpoint whose commit record stays is left whole"
