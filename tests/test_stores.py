"""The preparation on a real Ray cluster, beside the training."""

import io
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher import recipe as recipes
from launcher import stores
from launcher.data import store
from launcher.data.order import BLOCKS_PER_WINDOW
from launcher.data.store import Store
from launcher.errors import DataError
from launcher.facts import Prepared
from launcher.plan.plan import ModelFacts, World
from launcher.report.view import View
from tests.conftest import ROOT, write_jsonl
from tests.test_preparation import CHUNK, Case

pytestmark = pytest.mark.slow
WORLD = World(num_workers=2, device="cpu")
FACTS = ModelFacts(max_positions=64)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray

    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": path}},
    )
    yield
    ray.shutdown()


def until_whole(prepared: Prepared) -> None:
    deadline = time.monotonic() + 60
    while store.read_meta(Path(prepared.facts[0].train.stores[0])) is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_training_begins_beside_the_preparation(cluster: None, tmp_path: Path) -> None:
    case = Case(tmp_path, num_rows=20_000)
    case.stage |= {"steps": 5, "global_batch": 8}
    recipe, said = recipes.parse(case.recipe()), io.StringIO()
    # A process imports for as long as another makes this whole store: let both be there first.
    with stores.prepared(recipe, {}, FACTS, tmp_path / "warm", WORLD, View(io.StringIO()), CHUNK) as warm:
        until_whole(warm)
    with stores.prepared(recipe, {}, FACTS, tmp_path / "store", WORLD, View(said), CHUNK) as ready:
        train = ready.facts[0].train
        opened = Store(Path(train.stores[0]))
        assert not train.is_whole and opened.meta is None
        assert opened.num_blocks > 10 * BLOCKS_PER_WINDOW
        # What a rank would do now: any block comes, the last ones too.
        assert sum(len(opened.block(block).lengths) for block in range(opened.num_blocks)) == 20_000
        until_whole(ready)
    assert "preparing a:" in said.getvalue() and "tokens/s" in said.getvalue()
    with stores.prepared(recipe, {}, FACTS, tmp_path / "store", WORLD, View(said), CHUNK) as again:
        train = again.facts[0].train
        assert train.is_whole and train.num_samples == 20_000
        # What keeps `launcher runs clean` from freeing it.
        assert Path(train.stores[0]).name in again.stores
        assert all((tmp_path / "store" / name).is_dir() for name in again.stores)
        assert (Path(train.stores[0]) / store.USED).exists()


def test_a_bad_row_far_behind_reaches_the_workers_that_wait(cluster: None, tmp_path: Path) -> None:
    case = Case(tmp_path, num_rows=8_000)
    case.stage |= {"steps": 5, "global_batch": 8}
    recipe = recipes.parse(case.recipe())
    (job,) = case.describe("elsewhere").jobs
    last_chunk = job.order[-1]
    rows: list[dict] = [*case.rows]
    rows[round(8_000 * (last_chunk + 0.5) / job.num_chunks)] = {"text": None}
    write_jsonl(case.train, rows)
    with stores.prepared(recipe, {}, FACTS, tmp_path / "store", WORLD, View(io.StringIO()), CHUNK) as ready:
        opened = Store(Path(ready.facts[0].train.stores[0]))
        with pytest.raises(DataError, match=r'train.jsonl, line \d+: column "text" is empty'):
            sum(len(opened.block(block).lengths) for block in range(opened.num_blocks))
    told = json.loads((Path(ready.facts[0].train.stores[0]) / store.ERROR).read_text())
    assert "line" in told["message"]


def test_a_bad_row_in_what_is_needed_first_stops_before_training(cluster: None, tmp_path: Path) -> None:
    case = Case(tmp_path, num_rows=50)
    write_jsonl(case.train, [*case.rows[:7], {"text": 3}, *case.rows[8:]])
    recipe = recipes.parse(case.recipe())
    with (
        pytest.raises(DataError, match="train.jsonl, line 8"),
        stores.prepared(recipe, {}, FACTS, tmp_path / "store", WORLD, View(io.StringIO())),
    ):
        pytest.fail("nothing to train on")
