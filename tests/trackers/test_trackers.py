"""Each tracker's own process on a record, read back with the tracker's own means; servers that are not there."""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launcher import recipe as recipes
from launcher import trackers, tracking
from launcher.errors import RecipeError
from launcher.trackers.follow import LAST_S
from tests.conftest import free_port
from tests.trackers import records

STEPS = list(range(1, 13))
SECRET = "5ec4e7" * 6 + "0000"


def files_with_the_secret(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file() and SECRET.encode() in file.read_bytes()]


def wait_until_sent(run_dir: Path, kind: str) -> None:
    """Wait for a tracker to be up with the record: on a machine with other work, to begin takes long."""
    note, until_s = run_dir / "trackers" / f"{kind}.json", time.monotonic() + 150
    size = (run_dir / "metrics.jsonl").stat().st_size
    while not note.exists() or json.loads(note.read_text())["position"] < size:
        assert time.monotonic() < until_s, (run_dir / "logs" / f"tracker-{kind}.log").read_text()
        time.sleep(0.1)


def two_tries(run_dir: Path, tracker: Any) -> list[str]:
    """A run that fails after six steps and is done with the second try; return what was said of its trackers."""
    said: list[str] = []
    recipe = records.begin(run_dir, tracker)
    with tracking.followed(run_dir, recipe.trackers, said.append):
        records.first_try(run_dir)
        wait_until_sent(run_dir, recipe.trackers[0].kind)
        records.end(run_dir, "worker lost")
    with tracking.followed(run_dir, recipe.trackers, said.append):
        records.second_try(run_dir)
        wait_until_sent(run_dir, recipe.trackers[0].kind)
        records.end(run_dir, "done")
    return said


def test_tensorboard_shows_both_tries_as_one(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert two_tries(tmp_path / "it", "tensorboard") == []
    folder = tmp_path / "it" / "tensorboard"
    stage, run = EventAccumulator(str(folder / "chat")), EventAccumulator(str(folder))
    stage.Reload()
    run.Reload()
    losses = stage.Scalars("train/loss")
    assert [each.step for each in losses] == STEPS
    assert [each.value for each in losses] == pytest.approx([records.loss(step) for step in STEPS])
    assert [(each.step, each.value) for each in stage.Scalars("eval/accuracy")] == [(4, 0.25), (12, 0.75)]
    assert {"train/tokens_per_s", "train/padding", "checkpoint/save_s"} <= set(stage.Tags()["scalars"])
    texts = [each.tensor_proto.string_val[0].decode() for each in stage.Tensors("events")]
    assert texts == [
        "2 workers begin after step 0 of 12",
        "a worker failed: it was killed",
        "2 workers begin after step 4 of 12",
        "model written to x",
    ]
    (parameters,) = run.Tensors("recipe and ds config")
    assert "| stages.chat.learning_rate | 0.001 |" in parameters.tensor_proto.string_val[0].decode()
    assert "| stages.chat.metrics.loss | 0.5 |" in run.Tensors("end")[-1].tensor_proto.string_val[0].decode()


def test_in_a_folder_of_all_runs_a_new_run_of_the_same_name_stands_beside_the_old_one(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = {"kind": "tensorboard", "folder": str(tmp_path / "boards")}
    for runs in ("old", "new"):
        assert two_tries(tmp_path / runs / "it", tracker) == []
    assert sorted(path.name for path in (tmp_path / "boards").iterdir()) == ["it", "it.2"]
    stage = EventAccumulator(str(tmp_path / "boards" / "it.2" / "chat"))
    stage.Reload()
    assert [each.step for each in stage.Scalars("train/loss")] == STEPS


@pytest.mark.parametrize("store", ["sqlite", "file"])
def test_mlflow_has_one_run_of_both_tries(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db" if store == "sqlite" else f"file://{tmp_path}/mlruns"
    tracker = {"kind": "mlflow", "uri": uri, "experiment": "tests", "tags": {"team": "search"}}
    assert two_tries(tmp_path / "it", tracker) == []
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("tests")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "it" and run.info.status == "FINISHED"
    history = sorted(client.get_metric_history(run.info.run_id, "chat/loss"), key=lambda each: each.step)
    assert [(each.step, each.value) for each in history] == [(step, records.loss(step)) for step in STEPS]
    assert run.data.metrics["chat/eval/accuracy"] == 0.75 and run.data.metrics["chat/failures"] == 1
    assert run.data.metrics["final.stages.chat.metrics.loss"] == 0.5
    assert run.data.params["stages.chat.learning_rate"] == "0.001"
    assert run.data.params["ds.zero_optimization.stage"] == "2"
    assert run.data.tags["team"] == "search" and run.data.tags["tasks"] == "causal-lm"
    assert run.data.tags["last_event"] == "chat 12: model written to x"


@pytest.mark.slow
def test_an_mlflow_run_that_was_deleted_begins_anew_with_all_of_the_record(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri, run_dir = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "it"
    two_tries(run_dir, {"kind": "mlflow", "uri": uri})
    client = MlflowClient(uri)
    (old,) = client.search_runs([client.get_experiment_by_name("launcher").experiment_id])
    client.delete_run(old.info.run_id)
    recipe = recipes.parse({**_tree(), "trackers": [{"kind": "mlflow", "uri": uri}]})
    with tracking.followed(run_dir, recipe.trackers, print):
        until_s = time.monotonic() + 150
        while len(client.search_runs([old.info.experiment_id])) == 0 and time.monotonic() < until_s:
            time.sleep(0.5)
        wait_until_sent(run_dir, "mlflow")
    (new,) = client.search_runs([old.info.experiment_id])
    assert new.info.run_id != old.info.run_id
    assert len(client.get_metric_history(new.info.run_id, "chat/loss")) == len(STEPS)


def test_wandb_offline_writes_one_run_of_both_tries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = tmp_path / "it"
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    tracker = {"kind": "wandb", "project": "tests", "mode": "offline", "tags": {"team": "search"}}
    assert two_tries(run_dir, tracker) == []
    kept = [list(offline_records(file)) for file in sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))]
    assert len(kept) == 2, "each try writes a folder, which `wandb sync` joins"
    assert files_with_the_secret(run_dir) == []
    runs = [record.run for one in kept for record in one if record.WhichOneof("record_type") == "run"]
    assert {run.run_id for run in runs} == {
        json.loads((run_dir / "trackers" / "wandb.json").read_text())["id"]
    }
    assert (
        runs[0].display_name == "it" and runs[0].project == "tests" and list(runs[0].tags) == ["team:search"]
    )
    logged: dict[str, list[Any]] = defaultdict(list)
    for record in (record for one in kept for record in one):
        if record.WhichOneof("record_type") == "history":
            for item in record.history.item:
                logged[item.key or "/".join(item.nested_key)].append(json.loads(item.value_json))
    assert logged["chat/loss"] == [records.loss(step) for step in STEPS]
    steps = [step for step in logged["chat/step"] if step]
    assert steps == sorted(steps) and set(steps) == set(STEPS)
    assert logged["chat/eval/accuracy"] == [0.25, 0.75]
    metrics = [
        record.metric for one in kept for record in one if record.WhichOneof("record_type") == "metric"
    ]
    assert any(each.glob_name == "chat/*" and each.step_metric == "chat/step" for each in metrics)


def offline_records(path: Path) -> Iterator[Any]:
    """Read what W&B keeps offline: records in LevelDB's log format, after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    content, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # All of a record, or the last piece of it.
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def test_a_server_that_is_not_there_is_told_once_and_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
    uri = f"http://127.0.0.1:{free_port()}"
    recipe = records.begin(tmp_path / "it", {"kind": "mlflow", "uri": uri}, "tensorboard")
    with tracking.followed(tmp_path / "it", recipe.trackers, said.append):
        begun_s = time.monotonic()
        records.first_try(tmp_path / "it")
        assert time.monotonic() - begun_s < 1
        until_s = time.monotonic() + 60
        while not said and time.monotonic() < until_s:
            time.sleep(0.1)
        records.end(tmp_path / "it", "worker lost")
    (line,) = said
    assert line.startswith("tracker mlflow does not take the record (")
    assert "the run goes on without it" in line and str(tmp_path) in line
    assert SECRET not in line and files_with_the_secret(tmp_path) == []
    assert list((tmp_path / "it" / "tensorboard" / "chat").iterdir()), "the other one has taken it"


@contextmanager
def silent_server() -> Iterator[int]:
    """Yield the port of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.slow
def test_a_server_that_never_answers_delays_the_end_by_some_seconds_at_most(tmp_path: Path) -> None:
    said: list[str] = []
    with silent_server() as port:
        recipe = records.begin(tmp_path / "it", {"kind": "mlflow", "uri": f"http://127.0.0.1:{port}"})
        with tracking.followed(tmp_path / "it", recipe.trackers, said.append):
            records.first_try(tmp_path / "it")
            time.sleep(4)
            ended_s = time.monotonic()
        assert time.monotonic() - ended_s < LAST_S + 3
    assert len(said) == 1


def test_a_server_that_comes_back_gets_all_of_it(tmp_path: Path) -> None:
    """The folder that a database is in comes late, as a server that is started after the run."""
    from mlflow import MlflowClient

    said: list[str] = []
    uri = f"sqlite:///{tmp_path}/later/mlflow.db"
    recipe = records.begin(tmp_path / "it", {"kind": "mlflow", "uri": uri})
    (tmp_path / "later").write_text("a file, so that nothing can be in it")
    with tracking.followed(tmp_path / "it", recipe.trackers, said.append):
        records.first_try(tmp_path / "it")
        until_s = time.monotonic() + 60
        while not said and time.monotonic() < until_s:
            time.sleep(0.1)
        (tmp_path / "later").unlink()
        (tmp_path / "later").mkdir()
        wait_until_sent(tmp_path / "it", "mlflow")
        records.end(tmp_path / "it", "worker lost")
    assert len(said) == 1
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("launcher").experiment_id])
    assert run.info.status == "FAILED"
    assert len(client.get_metric_history(run.info.run_id, "chat/loss")) == 6


def test_a_driver_that_is_killed_leaves_no_process_and_all_of_its_record(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = tmp_path / "it"
    records.begin(run_dir, "tensorboard")
    records.first_try(run_dir)
    driver = (
        "import os, sys, pathlib\n"
        "from launcher import tracking, recipe as recipes\n"
        f"run_dir = pathlib.Path({str(run_dir)!r})\n"
        f"asked = recipes.parse({_tree() | {'trackers': ['tensorboard']}!r}).trackers\n"
        "with tracking.followed(run_dir, asked, print):\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    ended = subprocess.run([sys.executable, "-c", driver], env=os.environ, timeout=60)
    assert ended.returncode == -9
    wait_until_sent(run_dir, "tensorboard")
    stage = EventAccumulator(str(run_dir / "tensorboard" / "chat"))
    stage.Reload()
    assert [each.step for each in stage.Scalars("train/loss")] == STEPS[:6]


def _tree() -> dict[str, Any]:
    stage = {"name": "chat", "task": "causal-lm", "data": {"train": "x.jsonl"}, "learning_rate": 1e-3}
    return {"model": {"path": "some/model"}, "stages": [stage]}


def test_what_is_not_installed_or_leads_nowhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    nowhere = recipes.parse({**_tree(), "trackers": ["mlflow"]})
    with pytest.raises(RecipeError, match="export MLFLOW_TRACKING_URI"):
        trackers.check(nowhere.trackers)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.com")
    trackers.check(nowhere.trackers)
    with pytest.raises(RecipeError, match=r"wandbb is not .*: pip install -c constraints\.txt wandb"):
        trackers.need("wandbb", "wandb", "trackers: wandbb")


def test_names_tell_several_of_a_kind_apart() -> None:
    one = {"kind": "mlflow", "uri": "https://a.example.com"}
    recipe = recipes.parse(
        {**_tree(), "trackers": [one, "tensorboard", one | {"uri": "https://b.example.com"}]}
    )
    assert trackers.names(recipe.trackers) == ["mlflow", "tensorboard", "mlflow-2"]


@pytest.mark.slow
def test_an_interrupt_while_trackers_end_ends_the_waiting_and_not_the_run(tmp_path: Path) -> None:
    said: list[str] = []

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    def end_soon_interrupted() -> None:
        records.first_try(tmp_path / "it")
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        raise RuntimeError("how the run ended")

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with silent_server() as port:
            recipe = records.begin(tmp_path / "it", {"kind": "mlflow", "uri": f"http://127.0.0.1:{port}"})
            followed = tracking.followed(tmp_path / "it", recipe.trackers, said.append)
            ended_s = time.monotonic()
            with pytest.raises(RuntimeError, match="how the run ended"), followed:
                end_soon_interrupted()
            assert time.monotonic() - ended_s < 4
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    assert said and "has not taken all of the record" in said[0]


def test_a_tracker_that_cannot_be_started_is_told_and_the_run_goes_on(tmp_path: Path) -> None:
    said: list[str] = []
    recipe = records.begin(tmp_path / "it", "tensorboard")
    # Where its log would be made there is a directory.
    (tmp_path / "it" / "logs" / "tracker-tensorboard.log").mkdir(parents=True)
    with tracking.followed(tmp_path / "it", recipe.trackers, said.append):
        records.first_try(tmp_path / "it")
    (line,) = said
    assert line.startswith("tracker tensorboard cannot be started (") and "goes on without it" in line
