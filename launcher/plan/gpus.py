"""The GPUs that people rent: memory, speed, and what they usually come with."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from launcher.errors import ClusterError, nearest

GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """One kind of GPU.

    Attributes:
        name: as it is written in a description.
        memory_bytes: what torch reports as its total: less than the name says, since driver and error
            correction have taken their part.
        bf16_tflops: peak of dense matrix products, in 10^12 operations a second; None: not in hardware,
            or not known.
        fp32_tflops: of TF32 where the GPU has it.
        peer_bandwidth: bytes/s of one GPU to others of its node, in one direction.
    """

    name: str
    memory_bytes: int
    bf16_tflops: float | None = None
    fp16_tflops: float | None = None
    fp32_tflops: float | None = None
    peer_bandwidth: float

    def tflops(self, dtype: Literal["fp32", "bf16", "fp16"]) -> float | None:
        """Return the peak for a precision; None where it is unknown or not in hardware."""
        return {"fp32": self.fp32_tflops, "bf16": self.bf16_tflops, "fp16": self.fp16_tflops}[dtype]


@dataclass(frozen=True, slots=True)
class Gpu:
    """A row of the table, and what such a GPU usually comes with.

    `peer` in GB/s; `host` in GB of host memory for each GPU; `network` in Gb/s of a node.
    """

    memory_gib: float
    bf16: float | None
    fp16: float
    fp32: float
    peer: float
    host: float
    network: float
    aliases: str = ""


# Memory: torch's total_memory as people's reports show it, the smallest of them. Peaks: the vendors' data
# sheets, without sparsity; GeForce with fp32 sums. Host memory and network: the usual machines to rent.
GPUS = {
    "H100-80GB": Gpu(79.1, 989, 989, 495, 450, 250, 3200, "H100 H100-80G H100-SXM H100-SXM5 H100-80GB-HBM3"),
    "H100-PCIe-80GB": Gpu(79.1, 756, 756, 378, 64, 200, 100, "H100-PCIe H100-80GB-PCIe"),
    "H100-NVL-94GB": Gpu(93.0, 835, 835, 418, 64, 300, 100, "H100-NVL H100-94GB"),
    "H200-141GB": Gpu(139.7, 989, 989, 495, 450, 250, 3200, "H200 H200-SXM"),
    "B200-180GB": Gpu(178.3, 2250, 2250, 1125, 900, 250, 3200, "B200 B200-192GB B200-SXM"),
    "A100-40GB": Gpu(
        39.3, 312, 312, 156, 300, 85, 100, "A100-40G A100-SXM4-40GB A100-PCIe-40GB A100-SXM-40GB"
    ),
    "A100-80GB": Gpu(
        79.1,
        312,
        312,
        156,
        300,
        140,
        400,
        "A100-80G A100-SXM4-80GB A100-80GB-PCIe A100-SXM-80GB A100-PCIe-80GB",
    ),
    "A10G-24GB": Gpu(21.9, 70, 70, 35, 32, 48, 25, "A10G"),
    "A10-24GB": Gpu(21.9, 125, 125, 62.5, 32, 100, 25, "A10"),
    "L4-24GB": Gpu(21.9, 121, 121, 60, 32, 48, 25, "L4"),
    "L40S-48GB": Gpu(44.3, 362, 362, 183, 32, 96, 100, "L40S"),
    "V100-16GB": Gpu(15.7, None, 125, 15.7, 150, 60, 25, "V100-SXM2-16GB V100-PCIe-16GB V100-16G"),
    "V100-32GB": Gpu(
        31.7, None, 125, 15.7, 150, 90, 100, "V100-SXM2-32GB V100-SXM3-32GB V100-PCIe-32GB V100-32G"
    ),
    "T4-16GB": Gpu(14.5, None, 65, 8.1, 16, 48, 25, "T4"),
    "RTX-3090-24GB": Gpu(23.5, 71, 71, 35.6, 32, 64, 10, "RTX-3090"),
    "RTX-4090-24GB": Gpu(23.5, 165, 165, 82.6, 32, 64, 10, "RTX-4090"),
    "RTX-5090-32GB": Gpu(31.3, 209, 209, 104.8, 64, 64, 10, "RTX-5090"),
    "RTX-A6000-48GB": Gpu(47.4, 155, 155, 77.4, 32, 96, 10, "RTX-A6000 A6000"),
    "MI300X-192GB": Gpu(191.6, 1307, 1307, 654, 448, 190, 3200, "MI300X MI300X-OAM MI300X-HF"),
}

# Pascal, Volta and Turing make bf16 out of fp32: torch runs it, several times slower.
_OLDER = re.compile(r"(k80|m[46]0|p100|p40?|v100|t4g?|titan|quadro rtx|gtx|rtx ?20[678]0|rtx ?[4568]000$)\b")


def accelerator(name: str) -> Accelerator:
    """Return a GPU of the table by any of its names: ours, torch's or Ray's.

    Raises:
        ClusterError: no such GPU, or one that comes in two sizes.
    """
    key = find(name)
    gpu = GPUS[key]
    return Accelerator(
        name=key,
        memory_bytes=round(gpu.memory_gib * GIB),
        bf16_tflops=gpu.bf16,
        fp16_tflops=gpu.fp16,
        fp32_tflops=gpu.fp32,
        peer_bandwidth=gpu.peer * 1e9,
    )


def find(name: str) -> str:
    """Return the table's name for any name of a GPU.

    Raises:
        ClusterError: no such GPU, or one that comes in two sizes.
    """
    wanted = _plain(name)
    for key, gpu in GPUS.items():
        if wanted in {_plain(each) for each in (key, *gpu.aliases.split())}:
            return key
    sizes = [key for key in GPUS if wanted and _plain(key).startswith(wanted)]
    if sizes and all(re.fullmatch(r"\d+gb", _plain(key)[len(wanted) :]) for key in sizes):
        raise ClusterError(f"{name} comes as {' and '.join(sizes)}: write which")
    known = {_plain(each): key for key, gpu in GPUS.items() for each in (key, *gpu.aliases.split())}
    close = re.search('"(.+)"', nearest(wanted, known))
    hint = f' (did you mean "{known[close[1]]}"?)' if close else f": known are {', '.join(GPUS)}"
    raise ClusterError(f'unknown GPU "{name}"{hint}')


def names_in(resources: Iterable[str]) -> set[str]:
    """Return the kinds of GPU that a node's resources name, as Ray calls them."""
    return {key.partition(":")[2] for key in resources if key.startswith("accelerator_type:")}


def half(names: Iterable[str]) -> Literal["bf16", "fp16"]:
    """Return the 16-bit precision that all of these GPUs have in hardware: bf16 unless one is older than Ampere.

    Args:
        names: of GPUs, as in a description, torch or Ray.
    """
    return "fp16" if any(_OLDER.match(" ".join(_words(name))) for name in names) else "bf16"


def _plain(name: str) -> str:
    return "".join(_words(name))


def _words(name: str) -> list[str]:
    """A name without what vendors add in one place and leave out in another."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    return [word for word in words if word not in ("nvidia", "amd", "tesla", "geforce", "instinct")]
