"""What a start does without: each is imported by something that need not, unless it is kept out."""

import gc
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import lean
from tests.conftest import ROOT

DRIVER = ("ahead", "joining", "driver", "stores", "ending", "trial", "generation")


def _alone(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_what_is_hidden_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean, "UNNEEDED", ("colorsys", "json"))
    sys.modules.pop("colorsys", None)
    with lean.imports():
        assert not gc.isenabled()
        assert importlib.import_module("json") is json, "what is imported already is there"
        assert importlib.util.find_spec("colorsys") is None
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("colorsys")
    assert gc.isenabled()
    assert importlib.import_module("colorsys").rgb_to_hsv


def test_frames_are_told_without_their_lines_for_as_long_as_it_imports() -> None:
    plain = inspect.getframeinfo
    with lean.imports():
        told = inspect.getframeinfo(sys._getframe())
    assert (Path(told.filename).name, told.code_context) == (Path(__file__).name, None)
    assert told.lineno == inspect.getsourcelines(sys._getframe())[1] + 3
    assert inspect.getframeinfo is plain


def test_the_driver_needs_no_torch() -> None:
    imports = ", ".join(f"launcher.{name}" for name in DRIVER)
    _alone(f"import sys; sys.modules['torch'] = None; import {imports}")


def test_ordering_processes_needs_no_ray_train() -> None:
    code = "import sys, launcher.joining, launcher.bulletin; print([m for m in ('ray.train', 'torch') if m in sys.modules])"
    assert _alone(code).strip() == "[]"


def test_environments_are_as_ray_train_makes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.train.v2._internal import constants

    from launcher import environments, spare

    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "77")
    expected = constants.get_env_vars_to_propagate()
    assert expected["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] == "77"
    workers = environments.of_workers(on_gpu=True)
    assert expected.items() <= workers.items() and workers[spare.KIND] == "worker"


def test_ray_train_starts_no_actor_that_nobody_needs() -> None:
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from launcher import group

    plain, ours = (cls(print)._create_default_callbacks() for cls in (DataParallelTrainer, group._Trainer))
    names = [[type(each).__name__ for each in callbacks] for callbacks in (plain, ours)]
    assert set(names[0]) - set(names[1]) == {"DatasetsCallback", "PlacementGroupCleanerCallback"}
    # What is put in the place of Ray Train's own is there to be replaced.
    assert hasattr(group.WorkerGroup, "_init_train_context_on_workers")
    assert hasattr(group.FixedScalingPolicy, "_maybe_send_resource_request")
    assert group.of_groups.SynchronizationActor is group._NoActor


_EXPORTS = """
import sys
from pathlib import Path
from launcher import lean
lean.CACHE = Path(sys.argv[1])
with lean.imports():
    import transformers.models
print(sorted(transformers.models._class_to_module.items())[::97], len(dir(transformers)))
"""
_PLAIN = _EXPORTS.replace("with lean.imports():", "if True:")


def test_what_transformers_exports_is_read_once_and_stays_the_same(tmp_path: Path) -> None:
    plain = _alone(_PLAIN, str(tmp_path))
    assert not list(tmp_path.iterdir())
    for _ in range(2):
        assert _alone(_EXPORTS, str(tmp_path)) == plain
        (kept,) = tmp_path.iterdir()
    kept.write_bytes(b"not what it was")
    assert _alone(_EXPORTS, str(tmp_path)) == plain
    assert kept.stat().st_size > 10_000, "what cannot be read is read from the files again, and kept"


def test_what_is_kept_of_a_folder_goes_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean, "CACHE", tmp_path / "cache")
    (folder := tmp_path / "models" / "llama").mkdir(parents=True)
    read: list[str] = []

    def reads(path: str) -> dict[frozenset[str], set[str]]:
        read.append(path)
        return {frozenset({"torch"}): {file.name for file in folder.iterdir()}}

    (folder / "a.py").write_text("A = 1")
    first = lean._kept(str(tmp_path / "models"), reads)
    assert lean._kept(str(tmp_path / "models"), reads) == first
    assert len(read) == 1
    (folder / "b.py").write_text("B = 1")
    assert lean._kept(str(tmp_path / "models"), reads) == {frozenset({"torch"}): {"a.py", "b.py"}}
    monkeypatch.setattr(lean, "CACHE", tmp_path / "models" / "llama" / "a.py" / "no folder")
    assert lean._kept(str(tmp_path / "models"), reads) == {frozenset({"torch"}): {"a.py", "b.py"}}
