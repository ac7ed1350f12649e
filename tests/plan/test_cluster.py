"""Descriptions of clusters: what is read, what is assumed, what is refused."""

import pytest

from launcher.errors import ClusterError
from launcher.plan import cluster, gpus
from launcher.plan.gpus import GIB


def test_nodes_gpus_and_a_name() -> None:
    found = cluster.parse("16x8xH100-80GB")
    assert (found.num_nodes, found.workers_per_node, found.num_workers) == (16, 8, 128)
    assert found.device == "cuda" and found.accelerator is not None
    assert found.accelerator.name == "H100-80GB"
    assert found.accelerator.memory_bytes == round(79.1 * GIB)
    assert found.accelerator.tflops("bf16") == 989
    assert found.host_bytes == 8 * 250_000_000_000
    assert found.node_bandwidth == 400e9
    assert found.assumed == ("host memory 250 GB for each GPU", "network 3200 Gb/s")
    assert "16 nodes x 8 H100-80GB (79.1 GiB each)" in found.describe() and "assumed" in found.describe()


@pytest.mark.parametrize(
    ("text", "counts"),
    [("8xA100-80GB", (1, 8)), ("H100", (1, 1)), ("2 x 4 x l40s", (2, 4)), ("1x1xT4", (1, 1))],
)
def test_left_out_counts_are_one(text: str, counts: tuple[int, int]) -> None:
    found = cluster.parse(text)
    assert (found.num_nodes, found.workers_per_node) == counts


def test_options_are_of_one_node() -> None:
    found = cluster.parse("4x8xH100-80GB, host=2TB, net=400Gb, disk=10TB, price=98.32")
    assert found.host_bytes == 2 * 10**12
    assert found.node_bandwidth == 50e9
    assert found.disk_bytes == 10**13
    assert found.price_per_hour == pytest.approx(4 * 98.32)
    assert found.assumed == ()
    assert found.describe() == (
        "4 nodes x 8 H100-80GB (79.1 GiB each), host memory 1,863 GiB a node, network 400 Gb/s a node,"
        " disk 10.0 TB a node, 393.28 an hour"
    )


@pytest.mark.parametrize("rate", ["400Gb", "400Gb/s", "400Gbit", "400Gbps", "50GB", "50GB/s", "50000MB"])
def test_a_rate_in_bits_or_bytes(rate: str) -> None:
    assert cluster.parse(f"2x8xH100,net={rate}").node_bandwidth == 50e9


def test_cpu_workers_and_the_memory_of_a_node() -> None:
    small = cluster.parse("2xCPU-32GB")
    assert (small.num_nodes, small.workers_per_node, small.device) == (1, 2, "cpu")
    assert small.host_bytes == 32 * 10**9 and small.accelerator is None and small.assumed == ()
    plain = cluster.parse("1x2xCPU")
    assert plain.host_bytes is None and plain.num_workers == 2
    assert cluster.parse("3x2xcpu,host=64GiB").host_bytes == 64 * GIB
    assert cluster.parse("3x2xcpu").assumed == ("network 10 Gb/s",)


@pytest.mark.parametrize(
    ("text", "size"), [("1GB", 10**9), ("1GiB", GIB), ("1.5TB", 15 * 10**11), ("512g", 512 * 10**9), ("7", 7)]
)
def test_sizes(text: str, size: int) -> None:
    assert cluster.size_bytes(text) == size


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("NVIDIA H100 PCIe", "H100-PCIe-80GB"),
        ("NVIDIA H100 NVL", "H100-NVL-94GB"),
        ("NVIDIA H200", "H200-141GB"),
        ("NVIDIA B200", "B200-180GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100-40GB"),
        ("NVIDIA A10G", "A10G-24GB"),
        ("NVIDIA A10", "A10-24GB"),
        ("NVIDIA L4", "L4-24GB"),
        ("NVIDIA L40S", "L40S-48GB"),
        ("Tesla V100-SXM2-16GB", "V100-16GB"),
        ("Tesla V100-PCIE-32GB", "V100-32GB"),
        ("Tesla T4", "T4-16GB"),
        ("NVIDIA GeForce RTX 3090", "RTX-3090-24GB"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090-24GB"),
        ("NVIDIA GeForce RTX 5090", "RTX-5090-32GB"),
        ("NVIDIA RTX A6000", "RTX-A6000-48GB"),
        ("AMD Instinct MI300X", "MI300X-192GB"),
        # Ray's accelerator types.
        ("A100-80G", "A100-80GB"),
        ("A100-40G", "A100-40GB"),
        ("H100", "H100-80GB"),
        ("AMD-Instinct-MI300X-OAM", "MI300X-192GB"),
    ],
)
def test_the_names_that_torch_and_ray_give(name: str, known: str) -> None:
    assert gpus.find(name) == known


@pytest.mark.parametrize(
    ("name", "half"),
    [
        ("Tesla V100-SXM2-32GB", "fp16"),
        ("V100", "fp16"),
        ("NVIDIA T4", "fp16"),
        ("P4", "fp16"),
        ("Quadro RTX 6000", "fp16"),
        ("NVIDIA GeForce RTX 2080 Ti", "fp16"),
        ("NVIDIA RTX 6000 Ada Generation", "bf16"),
        ("NVIDIA RTX 2000 Ada Generation", "bf16"),
        ("RTX A6000", "bf16"),
        ("L4", "bf16"),
        ("NVIDIA Z9", "bf16"),
    ],
)
def test_half_precision_of_a_gpu(name: str, half: str) -> None:
    assert gpus.half([name]) == half
    assert gpus.half(["H100", name]) == half


def test_half_precision_of_the_table() -> None:
    for key, gpu in gpus.GPUS.items():
        assert (gpus.half([key]) == "fp16") == (gpu.bf16 is None), key
    assert cluster.parse("4xT4").world.half == "fp16" and cluster.parse("2xCPU-32GB").world.half == "bf16"


def test_no_name_stands_for_two_gpus() -> None:
    names = [name for key, gpu in gpus.GPUS.items() for name in (key, *gpu.aliases.split())]
    assert len({name.lower().replace("-", "") for name in names}) == len(names)
    for key, gpu in gpus.GPUS.items():
        # What torch reports is below what the name says, and near it.
        named = int(key.rpartition("-")[2].removesuffix("GB"))
        assert 0.85 * named < gpu.memory_gib < 1.01 * named


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("8xH100-80BG", 'unknown GPU "H100-80BG" (did you mean "H100-80GB"?)'),
        ("8xZX81", 'unknown GPU "ZX81": known are H100-80GB'),
        ("8xA100", "A100 comes as A100-40GB and A100-80GB: write which"),
        ("4xV100", "V100 comes as V100-16GB and V100-32GB: write which"),
        ("0x8xH100", "a count is 0"),
        ("8x", "'8x' is not nodes x GPUs x name"),
        ("", "'' is not nodes x GPUs x name"),
        ("2x2x2xH100", "is not nodes x GPUs x name"),
        ("8xH100,hots=2TB", '(did you mean "host"?)'),
        ("8xH100,host", "is not one of host, net, disk, price with =value"),
        ("8xH100,host=2TB,host=1TB", "is there twice"),
        ("8xH100,host=much", "host 'much' is not a size above 0 such as 512GB or 2TiB"),
        ("8xH100,disk=0GB", "disk '0GB' is not a size above 0"),
        ("8xH100,net=400", "net '400' is not a rate: write 400Gb (bits a second) or 50GB (bytes a second)"),
        ("8xH100,net=0Gb", "net '0Gb' is not a size above 0"),
        ("8xH100,price=free", "price 'free' is not a number"),
        ("8xH100,price=-1", "price '-1' is not a number"),
        ("8xH100,price=nan", "price 'nan' is not a number"),
        ("2xCPU-lots", "host memory 'lots' is not a size"),
    ],
)
def test_nonsense_is_refused_in_one_line(text: str, says: str) -> None:
    with pytest.raises(ClusterError) as caught:
        cluster.parse(text)
    message = str(caught.value)
    assert says in message and f'cluster "{text}"' in message and cluster.EXAMPLE in message
    assert "\n" not in message and caught.value.exit_code == 3


def test_a_live_cluster_is_as_its_smallest_node() -> None:
    big = {"num_gpus": 8, "gpu_name": "NVIDIA A100-SXM4-80GB", "gpu_bytes": 85_000_000_000}
    nodes = [
        big | {"host_bytes": 10**12, "num_cpus": 96},
        big | {"num_gpus": 4, "gpu_bytes": 84_000_000_000, "host_bytes": 2 * 10**12, "num_cpus": 48},
        {"num_gpus": 0, "gpu_name": None, "gpu_bytes": None, "host_bytes": 10**9, "num_cpus": 4},
    ]
    found = cluster.of_live(nodes)
    assert (found.num_nodes, found.workers_per_node, found.device) == (2, 4, "cuda")
    assert found.accelerator is not None and found.accelerator.name == "A100-80GB"
    assert found.accelerator.memory_bytes == 84_000_000_000 and found.accelerator.bf16_tflops == 312
    assert found.host_bytes == 10**12 and found.assumed == ("network 400 Gb/s",)
    measured = cluster.of_live(nodes, node_bandwidth=3e9)
    assert measured.node_bandwidth == 3e9 and measured.assumed == ()


def test_a_live_gpu_without_a_size_in_its_name_and_one_that_is_unknown() -> None:
    node = {"num_gpus": 1, "gpu_name": "A100", "gpu_bytes": int(39.4 * GIB), "host_bytes": 1, "num_cpus": 1}
    known = cluster.of_live([node]).accelerator
    assert known is not None and known.name == "A100-40GB"
    other = cluster.of_live([node | {"gpu_name": "NVIDIA Z9"}]).accelerator
    assert other is not None and other.name == "NVIDIA Z9" and other.tflops("bf16") is None


def test_live_cpu_nodes_and_none_at_all() -> None:
    node = {"num_gpus": 0, "gpu_name": None, "gpu_bytes": None, "host_bytes": None, "num_cpus": 4}
    found = cluster.of_live([node, node | {"num_cpus": 2}])
    assert (found.num_nodes, found.workers_per_node, found.device) == (2, 2, "cpu")
    assert found.host_bytes is None
    with pytest.raises(ClusterError, match="no node with GPUs or CPUs"):
        cluster.of_live([])
