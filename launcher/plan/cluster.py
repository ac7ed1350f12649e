"""The machines of a run, as a description: written by hand for a plan, or found on a live cluster."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from launcher.errors import ClusterError, nearest
from launcher.plan import gpus
from launcher.plan.gpus import GIB, Accelerator, Gpu
from launcher.plan.plan import World

EXAMPLE = "16x8xH100-80GB, 8xA100-80GB,host=1TB or 2xCPU-32GB"
CPU_NETWORK = 10
"""Gb/s between CPU nodes where nothing is said."""
_CPU = "CPU"
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "p": 10**15}
_BINARY = {"k": 1 << 10, "m": 1 << 20, "g": GIB, "t": 1 << 40, "p": 1 << 50}
_OPTIONS = ("host", "net", "disk", "price")
_PCIE_4 = 32e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Equal nodes.

    Attributes:
        workers_per_node: GPUs of a node, or CPU workers.
        accelerator: None on CPUs.
        host_bytes: memory of one node; None: unknown.
        node_bandwidth: bytes/s of one node to others, in one direction.
        disk_bytes: of one node; None: unknown.
        price_per_hour: of the whole cluster; None: unknown.
        latency_s: what the network adds to a message between nodes, beyond what is usual inside a rack.
        call_s: what a collective that is waited for costs besides, on CPUs: ranks come to it one after another.
        assumed: what nobody said and was filled in, in words.
    """

    num_nodes: int
    workers_per_node: int
    device: Literal["cuda", "cpu"]
    accelerator: Accelerator | None = None
    host_bytes: int | None = None
    node_bandwidth: float
    disk_bytes: int | None = None
    price_per_hour: float | None = None
    latency_s: float = 0.0
    call_s: float = 0.0
    assumed: tuple[str, ...] = ()

    @property
    def num_workers(self) -> int:
        return self.num_nodes * self.workers_per_node

    @property
    def world(self) -> World:
        """A worker on each GPU, or on each place for CPU workers."""
        half = gpus.half([self.accelerator.name] if self.accelerator else [])
        return World(num_workers=self.num_workers, device=self.device, half=half)

    def describe(self) -> str:
        """Return one line for a person."""
        gpu, few = self.accelerator, self.num_nodes == 1
        kind = f"{gpu.name} ({gpu.memory_bytes / GIB:.1f} GiB each)" if gpu else "CPU workers"
        parts = [f"{self.num_nodes} {'node' if few else 'nodes'} x {self.workers_per_node} {kind}"]
        if self.host_bytes is not None:
            parts.append(f"host memory {self.host_bytes / GIB:,.0f} GiB a node")
        if not few:
            parts.append(f"network {self.node_bandwidth * 8 / 1e9:,.0f} Gb/s a node")
        if self.disk_bytes is not None:
            parts.append(f"disk {self.disk_bytes / 1e12:,.1f} TB a node")
        if self.price_per_hour is not None:
            parts.append(f"{self.price_per_hour:,.2f} an hour")
        return ", ".join(parts) + (f" (assumed: {', '.join(self.assumed)})" if self.assumed else "")


def parse(text: str) -> Cluster:
    """Read a description: nodes x GPUs x name, then options after commas.

    `16x8xH100-80GB`, `8xA100-80GB` (one node), `2xCPU-32GB` (CPU workers and the memory of a node).
    Options, each of one node: `host=2TB` (memory), `net=400Gb` (a second; `50GB` in bytes), `disk=10TB`,
    `price=98.32` (an hour).

    Raises:
        ClusterError: it cannot be read; says what a right one looks like.
    """
    head, *rest = (part.strip() for part in text.replace("\u00d7", "x").split(","))
    found = re.fullmatch(r"(?:(\d+)\s*[xX]\s*)?(?:(\d+)\s*[xX]\s*)?([A-Za-z0-9][\w .-]*)", head)
    # A name never begins like a count: "8x" or "0xH100" would else be read as one.
    if found is None or re.match(r"\d+\s*[xX]|\d+$", found[3]):
        raise _wrong(text, f"{head!r} is not nodes x GPUs x name")
    counts = [int(each) for each in found.groups()[:2] if each is not None]
    if 0 in counts:
        raise _wrong(text, "a count is 0")
    num_nodes, per_node = [1, 1, *counts][-2:]
    return _of(text, num_nodes, per_node, found[3].strip(), _options(text, rest))


def of_live(nodes: Sequence[Mapping[str, Any]], node_bandwidth: float | None = None) -> Cluster:
    """Describe a live cluster; where nodes differ, the smallest counts.

    Args:
        nodes: of each node `num_gpus`, `gpu_name`, `gpu_bytes`, `host_bytes`, `num_cpus`, and if known
            `disk_bytes`. Where some have GPUs, those without are left out: they train nothing.
        node_bandwidth: bytes/s between nodes, where it was measured.

    Raises:
        ClusterError: there is nothing to train on.
    """
    with_gpus = [node for node in nodes if node.get("num_gpus")]
    training = with_gpus or [node for node in nodes if node.get("num_cpus")]
    if not training:
        raise ClusterError(
            "the cluster has no node with GPUs or CPUs: add one, or join another with --address"
        )
    accelerator = gpu = None
    if with_gpus:
        smallest = min(with_gpus, key=lambda node: node.get("gpu_bytes") or 0)
        accelerator, gpu = _live_accelerator(smallest)
    network = (gpu.network if gpu else CPU_NETWORK) * 1e9 / 8
    is_assumed = node_bandwidth is None and len(training) > 1
    return Cluster(
        num_nodes=len(training),
        workers_per_node=min(int(node["num_gpus" if with_gpus else "num_cpus"]) for node in training),
        device="cuda" if with_gpus else "cpu",
        accelerator=accelerator,
        host_bytes=_smallest(training, "host_bytes"),
        node_bandwidth=node_bandwidth or network,
        disk_bytes=_smallest(training, "disk_bytes"),
        assumed=(f"network {network * 8 / 1e9:g} Gb/s",) if is_assumed else (),
    )


def priced(cluster: Cluster, price: float | None) -> Cluster:
    """Return a cluster with the price an hour of one of its nodes; without one, as it is."""
    return cluster if price is None else replace(cluster, price_per_hour=price * cluster.num_nodes)


def size_bytes(text: str) -> int:
    """Return `2TB`, `512GiB` or a plain number as bytes: GB is 10^9, GiB is 2^30.

    Raises:
        ValueError: it is not a size above 0.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgtp]?)(i?)(b?)", text.strip(), re.IGNORECASE)
    if found is None or found[3] and not found[2]:
        raise ValueError(text)
    units = _BINARY if found[3] else _UNITS
    value = round(float(found[1]) * units[found[2].lower()])
    if value < 1:
        raise ValueError(text)
    return value


def _of(text: str, num_nodes: int, per_node: int, name: str, options: dict[str, str]) -> Cluster:
    gpu, found, memory = None, None, None
    if name.upper() == _CPU or name.upper().startswith(f"{_CPU}-"):
        if name[4:]:
            memory = _size(text, "host memory", name[4:])
    else:
        try:
            found = gpus.accelerator(name)
        except ClusterError as error:
            raise _wrong(text, str(error)) from None
        gpu = gpus.GPUS[found.name]
    assumed = []
    host = _size(text, "host", options["host"]) if "host" in options else memory
    if host is None and gpu is not None:
        host = round(gpu.host * 1e9) * per_node
        assumed.append(f"host memory {gpu.host:g} GB for each GPU")
    network = (gpu.network if gpu else CPU_NETWORK) * 1e9 / 8
    if "net" in options:
        network = _rate(text, options["net"])
    elif num_nodes > 1:
        assumed.append(f"network {network * 8 / 1e9:g} Gb/s")
    return Cluster(
        num_nodes=num_nodes,
        workers_per_node=per_node,
        device="cuda" if gpu else "cpu",
        accelerator=found,
        host_bytes=host,
        node_bandwidth=network,
        disk_bytes=_size(text, "disk", options["disk"]) if "disk" in options else None,
        price_per_hour=_price(text, options["price"]) * num_nodes if "price" in options else None,
        assumed=tuple(assumed),
    )


def _options(text: str, parts: list[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    for part in parts:
        key, equals, value = (each.strip() for each in part.partition("="))
        key = key.lower()
        if key not in _OPTIONS or not equals or not value or key in options:
            hint = nearest(key, _OPTIONS) if key not in _OPTIONS else ""
            what = "is there twice" if key in options else f"is not one of {', '.join(_OPTIONS)} with =value"
            raise _wrong(text, f"{part!r} {what}{hint}")
        options[key] = value
    return options


def _size(text: str, what: str, value: str) -> int:
    try:
        return size_bytes(value)
    except ValueError:
        raise _wrong(text, f"{what} {value!r} is not a size above 0 such as 512GB or 2TiB") from None


def _rate(text: str, value: str) -> float:
    bare = re.sub(r"(/s|ps)$", "", value.strip())
    # A small b counts bits, as network cards are sold; the capital one bytes.
    if not re.search(r"\d\s*[kmgtKMGT]i?[bB](it)?$", bare):
        raise _wrong(
            text, f"net {value!r} is not a rate: write 400Gb (bits a second) or 50GB (bytes a second)"
        )
    is_bits = bare.endswith(("b", "bit"))
    return _size(text, "net", bare.removesuffix("it")) / (8 if is_bits else 1)


def _price(text: str, value: str) -> float:
    try:
        price = float(value.lstrip("$"))
    except ValueError:
        price = -1.0
    if not 0 <= price < 1e9:
        raise _wrong(text, f"price {value!r} is not a number such as 98.32 (an hour and node)")
    return price


def _live_accelerator(node: Mapping[str, Any]) -> tuple[Accelerator, Gpu | None]:
    name, memory = str(node.get("gpu_name") or "GPU"), int(node.get("gpu_bytes") or 0)
    keys = []
    for each in (name, f"{name} {round(memory / 8 / GIB + 0.4) * 8}GB"):
        try:
            keys.append(gpus.find(each))
        except ClusterError:
            continue
    if not keys:
        return Accelerator(name=name, memory_bytes=memory, peer_bandwidth=_PCIE_4), None
    found = gpus.accelerator(keys[0])
    # nvidia-smi counts what the driver keeps, about 1 %; what differs by more is another card.
    is_same = not memory or 0.98 < memory / found.memory_bytes < 1.02
    size = min(memory or found.memory_bytes, found.memory_bytes) if is_same else memory
    return replace(found, memory_bytes=size), gpus.GPUS[keys[0]]


def _smallest(nodes: Sequence[Mapping[str, Any]], key: str) -> int | None:
    values = [node.get(key) for node in nodes]
    return None if None in values else min(int(value) for value in values if value is not None)


def _wrong(text: str, what: str) -> ClusterError:
    return ClusterError(f'cluster "{text}": {what}; right ones look like {EXAMPLE}')
