"""The pre-flight on a real cluster of two nodes, and what is judged of facts that one machine cannot have."""

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher import bandwidth, links, placement, preflight, probes, verdicts
from launcher.errors import StorageError
from launcher.plan import cluster as clusters
from launcher.plan.plan import World
from launcher.report import findings
from launcher.report.findings import Finding
from launcher.train import ops
from tests.conftest import make_tokenizer, write_jsonl
from tests.runs import add_raylet, own_cluster

pytestmark = pytest.mark.timeout(1200)

CPU = World(num_workers=3, device="cpu")
PLAIN = {
    "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
    "zero_optimization": {"stage": 3},
    "train_batch_size": 3,
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
}
# Of a quiet machine less than a minute is asked; this one may have other work.
PATIENT_S = 200.0


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[None]:
    import ray

    with own_cluster() as machines:
        for _ in range(2):
            add_raylet(machines, 2)
        ray.init(address=machines.address, log_to_driver=False)
        try:
            yield
        finally:
            ray.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tokenizer(tmp_path_factory.mktemp("model"), ["a river holds a garden"])
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(bytes(1000))
    return folder


def of(found: list[Finding], name: str) -> Finding:
    (one,) = [each for each in found if each.name == name]
    return one


@pytest.mark.slow
def test_all_is_well(two_nodes: None, model: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "train.jsonl", [{"text": "a"}] * 10)
    wanted = preflight.Wanted(
        world=CPU,
        ds_config=PLAIN,
        run_root=tmp_path / "runs",
        model_path=str(model),
        data_files=(str(data),),
        step_bytes=10**9,
        compute_s=0.001,
        host_bytes=1,
        disk_bytes=1,
    )
    found = preflight.check(wanted, PATIENT_S)
    names = "nodes placement versions cores memory disk model data storage ops bandwidth checkpoint clocks"
    assert [each.name for each in found] == names.split()
    assert [each for each in found if each.status == "failed"] == []
    assert of(found, "placement").what == "3 workers on 2 nodes (2 + 1)"
    assert of(found, "nodes").what.startswith("2 answered")
    assert "launcher 0.1.0+" in of(found, "versions").what
    assert set(of(found, "storage").figures["read_bytes_per_s"]) > {"driver"}
    assert len(of(found, "storage").figures["read_bytes_per_s"]) == 3
    assert of(found, "ops").what == "none needed"
    exchanged = of(found, "bandwidth")
    assert set(exchanged.figures["bytes_per_s"]) == {"all", "inside", "between"}
    assert all(rate > 0 for rate in exchanged.figures["bytes_per_s"].values())
    assert of(found, "checkpoint").what.startswith("step 0 of a small model saved and loaded by all ranks in")
    # Seconds of communication beside a millisecond of computing.
    assert exchanged.status == "warning" and "ZeRO-3 would crawl here" in exchanged.what
    assert exchanged.figures["share"] > 0.9
    assert not [file for file in (tmp_path / "runs").iterdir() if "preflight" in file.name]
    table = findings.lines(found)
    assert len(table) == len(found) and all("\n" not in line for line in table)
    assert json.loads(json.dumps(findings.as_json(found)))[1]["figures"]["workers"]


@pytest.mark.slow
def test_what_is_wrong_is_said_with_a_remedy_and_in_time(two_nodes: None, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ds_config = {
        **PLAIN,
        "zero_optimization": {
            "stage": 3,
            "offload_param": {"device": "nvme", "nvme_path": str(tmp_path / "file" / "below")},
        },
    }
    wanted = preflight.Wanted(
        world=World(num_workers=9, device="cpu"),
        ds_config=ds_config | {"optimizer": {"type": "Lamb"}},
        run_root=tmp_path / "runs",
        model_path=str(tmp_path / "no-model"),
        data_files=(str(tmp_path / "absent.jsonl"),),
        host_bytes=1 << 50,
        disk_bytes=1 << 60,
    )
    started_s = time.monotonic()
    # A part of it is waited for places that never come.
    found = preflight.check(wanted, PATIENT_S * 0.6)
    assert time.monotonic() - started_s < PATIENT_S * 0.6 + 5
    assert of(found, "placement").what == (
        "9 workers need 9 CPUs, the cluster has 4 and no autoscaler that says what it can add: use --workers 4,"
        " or add nodes"
    )
    assert "absent.jsonl: no such file (on every node)" in of(found, "data").what
    assert "no-model: no such directory" in of(found, "model").what
    assert "below cannot be written: Not a directory: name another nvme_path" in of(found, "NVMe").what
    assert "the plan needs 1048576.0: offload less, or use more nodes" in of(found, "memory").what
    assert "GiB are needed: free some" in of(found, "disk").what
    assert "DeepSpeed has no FusedLambBuilder for this accelerator" in of(found, "ops").what
    if not Path("/usr/include/libaio.h").exists():
        assert "async_io: cannot be built here: install libaio" in of(found, "ops").what
    wrong = ("placement", "data", "model", "NVMe", "memory", "disk", "ops")
    assert {of(found, name).status for name in wrong} == {"failed"}
    assert [each for each in found if each.name == "bandwidth"] == []


@pytest.mark.slow
def test_a_cluster_says_what_it_can_grow_to(two_nodes: None) -> None:
    import ray
    from ray.core.generated.autoscaler_pb2 import ClusterConfig, NodeGroupConfig
    from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_put

    raylet = ray._raylet
    key = raylet.GCS_AUTOSCALER_CLUSTER_CONFIG_KEY.encode()
    namespace = raylet.GCS_AUTOSCALER_STATE_NAMESPACE.encode()
    group = NodeGroupConfig(resources={"CPU": 4}, max_count=3, name="large")
    _internal_kv_put(key, ClusterConfig(node_group_configs=[group]).SerializeToString(), namespace=namespace)
    try:
        fits = placement.missing(World(num_workers=12, device="cpu"), 1.0)
        assert fits.status == "warning"
        assert "the autoscaler can add large (up to 3), and the run waits for them" in fits.what
        never = placement.missing(World(num_workers=13, device="cpu"), 1.0)
        assert never.status == "failed" and "can grow to 12: use --workers 12" in never.what
    finally:
        _internal_kv_del(key, namespace=namespace)
    assert placement.missing(World(num_workers=13, device="cpu"), 1.0).figures["there"] == 4


@pytest.mark.slow
def test_a_live_cluster_as_a_description(two_nodes: None) -> None:
    found = clusters.of_live(preflight.live(100.0))
    assert (found.num_nodes, found.workers_per_node, found.device) == (2, 2, "cpu")
    assert found.host_bytes and found.disk_bytes


@pytest.mark.slow
def test_ranks_that_are_in_no_place_measure_nothing(two_nodes: None) -> None:
    with bandwidth.linked(CPU, None) as none:
        assert none == []


def test_a_run_root_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(StorageError, match="cannot be written: Not a directory"),
        preflight._folder(tmp_path / "file"),
    ):
        pytest.fail("not a folder")


def test_a_place_that_hangs_takes_its_own_time_only(model: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "nvme").mkdir()
    asked = probes.Look(
        run_root=str(tmp_path),
        folder=str(tmp_path),
        model_path=str(model),
        data_files=(str(tmp_path / "pipe.jsonl"),),
        scratch=(str(tmp_path / "nvme"),),
        limit_s=6,
    )
    started_s = time.monotonic()
    told = probes.look(asked, "node")
    assert time.monotonic() - started_s < 9
    assert told["data"] == {"error": "no answer within 6 s"}
    assert told["model"]["has_tokenizer"] and told["model"]["sizes"]["model.safetensors"] == 1000
    assert told["machine"]["host_bytes"] > told["machine"]["free_host_bytes"] > 0
    assert told["scratch"][str(tmp_path / "nvme")]["bytes_per_s"] > 0
    assert list((tmp_path / "nvme").iterdir()) == []
    written = probes.read(str(tmp_path / "node"), told["storage"]["digest"])
    assert written["bytes_per_s"] > 0
    assert probes.read(str(tmp_path / "node"), "other") == {"error": "node has other content there"}


def test_a_broken_model_directory(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "broken")
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    assert "broken: " in probes.model(str(tmp_path / "broken"))["error"]
    (tmp_path / "broken" / "tokenizer.json").unlink()
    bare = {"node": {"model": probes.model(str(tmp_path / "broken"))}}
    found = verdicts.readable("model", bare)
    assert found is not None and found.status == "warning" and "no tokenizer beside the model" in found.what


@pytest.mark.parametrize(
    ("changes", "builders"),
    [
        ({}, ("FusedAdamBuilder",)),
        ({"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}, ()),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, ("CPUAdamBuilder",)),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            ("CPUAdamBuilder", "PinMemoryBuilder", "AsyncIOBuilder"),
        ),
        (
            {"zero_optimization": {"offload_param": {"device": "nvme"}}, "aio": {"use_gds": True}},
            ("FusedAdamBuilder", "PinMemoryBuilder", "AsyncIOBuilder", "GDSBuilder"),
        ),
        ({"optimizer": {"type": "Lion"}}, ("FusedLionBuilder",)),
        ({"optimizer": {"type": "SGD"}}, ()),
        (
            {"optimizer": {"type": "SGD"}, "zero_optimization": {"zero_quantized_weights": True}},
            ("QuantizerBuilder",),
        ),
    ],
)
def test_the_ops_that_a_ds_config_needs(changes: dict, builders: tuple[str, ...]) -> None:
    assert ops.needed({"optimizer": {"type": "AdamW"}} | changes) == builders


def test_a_lock_that_a_killed_process_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    answer = ops.build("CPUAdamBuilder", 0.3)
    assert answer["op"] == "cpu_adam" and answer["late"] is None
    assert f"{lock} is " in answer["error"] and "s old and no process here holds it" in answer["error"]
    assert "delete this file, unless another node" in answer["error"] and answer["seconds"] < 60
    with open(lock):
        held = ops.build("CPUAdamBuilder", 0.3)
    assert held["error"] is None and held["late"] == f"process {os.getpid()} compiles it"
    os.utime(lock, (0, 0))
    assert ops._forgotten(lock) and not lock.exists(), "nobody compiles for so long"
    late = verdicts.ops({"a": {"CPUAdamBuilder": held}, "b": {"CPUAdamBuilder": {}}}, 40)
    assert late.status == "warning" and "it goes on, and workers wait for it" in late.what


def test_workers_do_not_wait_for_a_build_that_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    offloaded = {
        "optimizer": {"type": "AdamW"},
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    }
    with open(lock):
        ops.forget_killed_builds(offloaded, old_s=0)
        assert lock.exists(), "this process holds it"
    started_s = time.monotonic()
    ops.forget_killed_builds(offloaded, old_s=1.5)
    assert not lock.exists()
    assert time.monotonic() - started_s > 0.5, "another node may have it while it is young"


def test_a_build_without_a_compiler_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    answer = ops.build("ShareMemCommBuilder", 5)
    assert "\n" not in answer["error"] and "no-such-compiler" in answer["error"]
    assert "a C++ compiler and ninja are needed on the path" in answer["error"]


def test_groups_of_ranks() -> None:
    assert links.groups((0,)) == []
    assert links.groups((0, 0)) == [("all", (0, 1))]
    assert links.groups((0, 1)) == [("all", (0, 1))]
    assert links.groups((0, 0, 1, 1)) == [
        ("all", (0, 1, 2, 3)),
        ("inside", (0, 1)),
        ("inside", (2, 3)),
        ("between", (0, 2)),
    ]


def test_room_in_use_and_room_that_is_coming() -> None:
    world = World(num_workers=4, device="cuda")
    busy = placement.verdict(world, 8, 2, [], [], 10)
    assert busy.status == "warning" and "but only 2 were free within 10 s" in busy.what
    coming = placement.verdict(world, 0, 0, [], ["starting 1 x gpu"], 10)
    assert coming.status == "warning" and "(starting 1 x gpu): the run waits" in coming.what
    endless = [placement.NodeType(name="gpu", most=None, resources={"GPU": 1})]
    assert "up to any number" in placement.verdict(world, 0, 0, endless, [], 10).what


@pytest.mark.slow
def test_node_types_of_a_cluster_of_ray_up(two_nodes: None, tmp_path: Path) -> None:
    config = tmp_path / "ray_bootstrap_config.yaml"
    config.write_text(
        "max_workers: 5\nhead_node_type: head\navailable_node_types:\n"
        "  head: {resources: {CPU: 4}}\n  gpu: {resources: {GPU: 8}, max_workers: 2}\n  more: {resources: {GPU: 1}}\n"
    )
    found = {each.name: each.most for each in placement.node_types(config)}
    assert found == {"head": 1, "gpu": 2, "more": 5}
    assert placement.node_types(tmp_path / "absent.yaml") == []
    config.write_text("- nothing")
    assert placement.node_types(config) == []


def node(**aspects: Any) -> dict[str, Any]:
    gpu = {"name": "NVIDIA L4", "bytes": 24 << 30, "used_bytes": 0, "driver": "550.1"}
    machine = {
        "cores": 8,
        "load": 0.1,
        "host_bytes": 64 << 30,
        "free_host_bytes": 60 << 30,
        "gpus": [gpu, gpu],
    }
    machine |= {"disks": {"/runs": 1 << 40, "/tmp": 1 << 40}}
    return {"machine": machine | aspects.pop("machine", {}), **aspects}


def test_gpus_that_differ_or_are_in_use() -> None:
    two = {"a": 2, "b": 2}
    fine = verdicts.processors({"a": node(), "b": node()}, two, {})
    assert (fine.status, fine.what) == ("ok", "4 x NVIDIA L4, driver 550.1")
    used = {"name": "NVIDIA T4", "bytes": 16 << 30, "used_bytes": 3 << 30, "driver": "535.2"}
    odd = verdicts.processors({"a": node(), "b": node(machine={"gpus": [used]})}, two, {})
    assert odd.status == "warning"
    for what in (
        "b: Ray gives away 2 GPUs, nvidia-smi shows 1",
        "b: 3.0 GiB of GPU 0 are in use: end the process that holds them",
        "GPU drivers differ: 550.1 on a, 535.2 on b",
        "GPUs differ, the slowest sets the pace: NVIDIA L4 on a, NVIDIA T4 on b",
    ):
        assert what in odd.what
    assert verdicts.devices([{"name": "NVIDIA L4", "cuda": "12.8"}]).status == "ok"
    blind = verdicts.devices([{"name": "NVIDIA L4", "cuda": "12.8"}, {"name": None, "cuda": "12.8"}])
    assert blind.what == "torch sees no GPU on ranks 1: it is built for CUDA 12.8: match driver and torch"


def test_more_workers_than_cores() -> None:
    found = verdicts.processors({"a": node()}, {}, {"a": 9})
    assert found.what == "a: 9 workers on 8 cores: fewer are faster"


def test_versions_that_differ() -> None:
    ours = {"torch": "2.13.0", "launcher": "0.1.0+aa"}
    told = {"a": {"versions": ours}, "b": {"versions": {"torch": "2.12.0", "launcher": "0.1.0+bb"}}}
    found = verdicts.versions(told, ours)
    assert found is not None and found.status == "failed"
    assert "torch is 2.12.0 on b, 2.13.0 on the driver: install the same everywhere" in found.what
    assert "launcher is 0.1.0+bb on b, 0.1.0+aa on the driver: bring the same code everywhere" in found.what


def test_little_memory_and_little_disk() -> None:
    told = {"a": node(machine={"free_host_bytes": 1 << 30, "disks": {"/runs": 5 << 30, "/tmp": 1 << 20}})}
    assert verdicts.memory(told, None).what == "a: 1.0 of 64.0 GiB are free: end what uses it"
    assert verdicts.memory(told, 2 << 30).status == "warning"
    assert verdicts.memory(told, 65 << 30).status == "failed"
    found = verdicts.disks(told, None, "/runs")
    assert found.status == "failed" and "a: 0.0 GiB free in /tmp: free some" in found.what
    assert "a: only 5.0 GiB free in /runs" in found.what
    assert "6.0 GiB are needed" in verdicts.disks(told, 6 << 30, "/runs").what


def test_storage_that_is_not_shared_or_slow() -> None:
    told = {
        "a": {"storage": {"digest": "x", "bytes_per_s": 1e6}},
        "b": {"storage": {"error": "b is read-only"}},
    }
    reads = {"node b": {"error": "a: No such file or directory", "writer": "a"}}
    found = verdicts.storage(told, reads, "/runs")
    assert found.status == "failed"
    assert "b: b is read-only" in found.what
    assert (
        "node b did not read what a wrote to /runs (a: No such file or directory): give --run-root"
        in found.what
    )
    assert "a writes 1 MB/s to /runs: saving will be slow" in found.what


def test_files_that_are_not_the_same_everywhere() -> None:
    told = {"a": {"data": {"sizes": {"/d": 5}}}, "b": {"data": {"sizes": {"/d": 6}}}}
    found = verdicts.readable("data", told)
    assert found is not None and found.status == "failed"
    assert found.what == "/d is not the same everywhere, in bytes: 5 on a, 6 on b"
    assert verdicts.readable("data", {"a": {"data": {}}}) is None
    hub = verdicts.readable("model", {"a": {"model": {"hub": "reachable"}}})
    assert hub is not None and hub.status == "ok"


def test_a_clock_that_is_wrong() -> None:
    found = verdicts.clocks({"a": 0.0, "b": -60.2})
    assert (found.status, found.what) == ("warning", "b's clock is 60 s behind: run a time service")


def test_when_zero3_would_crawl() -> None:
    rates = {
        "all": {"all_gather": {1 << 20: 1e8, 1 << 24: 5e8}, "reduce_scatter": {1 << 20: 1e8, 1 << 24: 6e8}}
    }
    slow = verdicts.bandwidth(rates, 3, True, (None, None))
    assert slow.status == "warning" and "ZeRO-3 would crawl here (all 0.5 GB/s)" in slow.what
    assert verdicts.bandwidth(rates, 2, True, (None, None)).status == "ok"
    assert verdicts.bandwidth(rates, 3, False, (None, None)).status == "ok"
    little = verdicts.bandwidth(rates, 3, True, (10**8, 1.0))
    assert little.status == "ok" and little.figures["communication_s"] == pytest.approx(0.2)
    assert (
        "0.2 s of communication a step beside 1 s of computing, 17% when they do not overlap" in little.what
    )
    none = verdicts.bandwidth({"error": "timed out"}, 3, True, (None, None))
    assert none.status == "failed" and "could not exchange tensors: timed out: do nodes reach" in none.what
    assert verdicts.bandwidth({}, 3, True, (10**9, 1.0)).what == "one worker: nothing to exchange"


def test_a_node_that_does_not_answer() -> None:
    found = preflight._answered({"a": {"machine": {}}, "b": {}, "c": {"lost": "the node died"}}, 26)
    assert found.status == "failed"
    assert "b: no answer within 26 s: is it alive" in found.what and "c: the node died" in found.what
    assert sys.modules["launcher.preflight"].LIMIT_S < 60
