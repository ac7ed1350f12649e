"""What nodes told, judged: fine, doubtful or wrong, and what to do about it. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

from launcher.report.findings import Finding, Status, finding

Facts = Mapping[str, Any]
ByNode = Mapping[str, Facts]

GIB = 1 << 30
LITTLE_DISK_BYTES, NO_DISK_BYTES = 10 * GIB, GIB
LITTLE_HOST_SHARE = 0.1
SLOW_STORAGE = 20e6
USED_GPU_BYTES = GIB
MOST_SKEW_S = 5.0
SLOW_ZERO3 = 1e9
"""Bytes/s between GPUs below which ZeRO-3 is slow whatever the model."""
MOST_COMMUNICATION = 0.5


def by_aspect(told: ByNode, aspect: str) -> tuple[dict[str, Any], list[tuple[Status, str]]]:
    """Return what the nodes told of an aspect, and the failures of those that could not."""
    facts: dict[str, Any] = {}
    said: list[tuple[Status, str]] = []
    for node, all_facts in told.items():
        # A node that gave no answer at all is one finding, not one of every check.
        part = all_facts.get(aspect) or {}
        if "error" in part:
            said.append(("failed", f"{node}: {part['error']}"))
        elif part:
            facts[node] = part
    return facts, said


def processors(told: ByNode, gpus_of: Mapping[str, int], workers_of: Mapping[str, int]) -> Finding:
    """Judge GPUs and drivers where Ray has GPUs, else cores.

    Args:
        told: by node.
        gpus_of: how many GPUs Ray gives away on a node.
        workers_of: how many workers are to run on a node, as far as it is known.
    """
    facts, said = by_aspect(told, "machine")
    if not any(gpus_of.values()):
        for node, machine in facts.items():
            if workers_of.get(node, 0) > machine["cores"]:
                said.append(
                    (
                        "warning",
                        f"{node}: {workers_of[node]} workers on {machine['cores']} cores: fewer are faster",
                    )
                )
        cores = {node: machine["cores"] for node, machine in facts.items()}
        return finding("cores", said, f"{_listed(cores.values())} a node", cores)
    cards = {node: machine["gpus"] for node, machine in facts.items() if gpus_of.get(node)}
    for node, found in cards.items():
        if len(found) != gpus_of[node] and found:
            said.append(
                ("warning", f"{node}: Ray gives away {gpus_of[node]} GPUs, nvidia-smi shows {len(found)}")
            )
        for number, gpu in enumerate(found):
            if gpu["used_bytes"] > USED_GPU_BYTES:
                used = f"{gpu['used_bytes'] / GIB:.1f} GiB of GPU {number} are in use"
                said.append(("warning", f"{node}: {used}: end the process that holds them"))
    for key, what in (("driver", "GPU drivers differ"), ("name", "GPUs differ, the slowest sets the pace")):
        values = {
            node: ", ".join(sorted({gpu[key] for gpu in found})) for node, found in cards.items() if found
        }
        said += _differences("warning", what, values)
    every = [gpu for found in cards.values() for gpu in found]
    fine = f"{len(every)} x {every[0]['name']}, driver {every[0]['driver']}" if every else "no nvidia-smi"
    return finding("GPUs", said, fine, cards)


def devices(seen: Sequence[Facts]) -> Finding:
    """Judge what torch sees of the ranks' GPUs: `name` None where it sees none."""
    blind = [str(rank) for rank, device in enumerate(seen) if device["name"] is None]
    said: list[tuple[Status, str]] = []
    if blind:
        built = f"it is built for CUDA {seen[int(blind[0])]['cuda']}"
        said.append(
            ("failed", f"torch sees no GPU on ranks {', '.join(blind)}: {built}: match driver and torch")
        )
    names = sorted({str(device["name"]) for device in seen})
    return finding("torch", said, f"sees {', '.join(names)} on all {len(seen)} ranks", {"ranks": seen})


def versions(told: ByNode, ours: Mapping[str, str]) -> Finding | None:
    """Judge whether all nodes hold the driver's versions; None where no node tells."""
    facts, said = by_aspect(told, "versions")
    if not facts and not said:
        return None
    for package, version in ours.items():
        others = {node: found[package] for node, found in facts.items() if found.get(package) != version}
        for node, other in others.items():
            remedy = (
                "install the same everywhere" if package != "launcher" else "bring the same code everywhere"
            )
            said.append(("failed", f"{package} is {other} on {node}, {version} on the driver: {remedy}"))
    fine = ", ".join(f"{package} {version}" for package, version in ours.items()) + " everywhere"
    return finding("versions", said, fine, {"driver": dict(ours), **facts})


def memory(told: ByNode, needed_bytes: int | None) -> Finding:
    """Judge the hosts' memory against what a node needs, where that is known."""
    facts, said = by_aspect(told, "machine")
    figures = {}
    for node, machine in facts.items():
        free, total = machine["free_host_bytes"], machine["host_bytes"]
        figures[node] = {"total_bytes": total, "free_bytes": free}
        if needed_bytes is not None and free < needed_bytes:
            status: Status = "failed" if total < needed_bytes else "warning"
            need = f"{node}: {free / GIB:.1f} of {total / GIB:.1f} GiB are free, the plan needs"
            said.append((status, f"{need} {needed_bytes / GIB:.1f}: offload less, or use more nodes"))
        elif free < LITTLE_HOST_SHARE * total:
            said.append(
                ("warning", f"{node}: {free / GIB:.1f} of {total / GIB:.1f} GiB are free: end what uses it")
            )
    least = min((figure["free_bytes"] for figure in figures.values()), default=0)
    return finding("memory", said, f"{least / GIB:.1f} GiB free on the fullest node", figures)


def disks(told: ByNode, needed_bytes: int | None, folder: str) -> Finding:
    """Judge free disk: the run root against what the run writes, and each node's temporary folder."""
    facts, said = by_aspect(told, "machine")
    figures = {node: machine["disks"] for node, machine in facts.items()}
    for node, free_of in figures.items():
        for place, free in free_of.items():
            need = (needed_bytes or 0) if place == folder else 0
            if free < max(need, NO_DISK_BYTES):
                wanted = f", {need / GIB:.1f} GiB are needed" if need > free else ""
                said.append(("failed", f"{node}: {free / GIB:.1f} GiB free in {place}{wanted}: free some"))
            elif free < LITTLE_DISK_BYTES:
                said.append(("warning", f"{node}: only {free / GIB:.1f} GiB free in {place}"))
    least = min((free for free_of in figures.values() for free in free_of.values()), default=0)
    return finding("disk", said, f"{least / GIB:,.0f} GiB free at least", figures)


def storage(told: ByNode, reads: Mapping[str, Facts], folder: str) -> Finding:
    """Judge whether what each node wrote was read by the driver and by another node, its `writer`."""
    facts, said = by_aspect(told, "storage")
    for reader, answer in reads.items():
        if "error" in answer:
            what = f"{reader} did not read what {answer['writer']} wrote to {folder} ({answer['error']})"
            said.append(
                ("failed", f"{what}: give --run-root a directory that all nodes share, and that is quick")
            )
    rates = {node: written["bytes_per_s"] for node, written in facts.items()}
    for node, rate in rates.items():
        if rate < SLOW_STORAGE:
            said.append(("warning", f"{node} writes {rate / 1e6:.0f} MB/s to {folder}: saving will be slow"))
    read = {reader: answer.get("bytes_per_s") for reader, answer in reads.items()}
    fine = (
        f"every node writes ({min(rates.values(), default=0) / 1e6:,.0f} MB/s at least) and is read by others"
    )
    return finding("storage", said, fine, {"write_bytes_per_s": rates, "read_bytes_per_s": read})


def scratch(told: ByNode) -> Finding | None:
    """Judge the folders of the ds config that each node writes for itself; None where there are none."""
    facts, said = by_aspect(told, "scratch")
    for node, folders in facts.items():
        for answer in folders.values():
            if "error" in answer:
                said.append(("failed", f"{node}: {answer['error']}: name another nvme_path in the ds config"))
    if not facts and not said:
        return None
    places = ", ".join(sorted({place for folders in facts.values() for place in folders}))
    return finding("NVMe", said, f"every node writes to {places}", facts)


def readable(name: str, told: ByNode) -> Finding | None:
    """Judge data files (or a model's), read by every node; None where there are none."""
    facts, said = by_aspect(told, name)
    sizes = {node: found["sizes"] for node, found in facts.items() if "sizes" in found}
    files = list(dict.fromkeys(file for found in sizes.values() for file in found))
    for file in files:
        values = {node: found.get(file, f"{file}: absent") for node, found in sizes.items()}
        wrong = {node: value for node, value in values.items() if isinstance(value, str)}
        for value in dict.fromkeys(wrong.values()):
            where = _where([node for node in wrong if wrong[node] == value], len(values))
            said.append(("failed", f"{value} ({where})"))
        said += _differences(
            "failed", f"{file} is not the same everywhere, in bytes", {} if wrong else values
        )
    said += [
        ("warning", f"{node}: no tokenizer beside the model: is the recipe's tokenizer elsewhere?")
        for node, found in facts.items()
        if found.get("has_tokenizer") is False
    ]
    if not facts and not said:
        return None
    fine = f"{len(files)} files, read by every node" if sizes else "on the hub, which every node reaches"
    return finding(name, said, fine, {"files": len(files), "nodes": len(facts)})


def clocks(skews_s: Mapping[str, float]) -> Finding:
    """Judge by how many seconds at least each node's clock differs from the driver's."""
    said: list[tuple[Status, str]] = [
        (
            "warning",
            f"{node}'s clock is {abs(skew):.0f} s {'ahead' if skew > 0 else 'behind'}: run a time service",
        )
        for node, skew in skews_s.items()
        if abs(skew) > MOST_SKEW_S
    ]
    return finding("clocks", said, f"within {MOST_SKEW_S:g} s of the driver's", dict(skews_s))


def ops(built: ByNode, limit_s: float) -> Finding:
    """Judge the op builds: by node, by builder, `seconds` and `error`; an empty answer is still compiling."""
    said: list[tuple[Status, str]] = []
    failures: dict[str, list[str]] = {}
    late: dict[str, list[str]] = {}
    for node, answers in built.items():
        for builder, answer in answers.items():
            if not answer or answer.get("late"):
                who = f" ({answer['late']})" if answer else ""
                late.setdefault(f"{builder.removesuffix('Builder')}{who}", []).append(node)
            elif answer.get("error"):
                failures.setdefault(f"{answer['op']}: {answer['error']}", []).append(node)
    said += [("failed", f"{what} ({_where(nodes, len(built))})") for what, nodes in failures.items()]
    waits = f"not ready after {limit_s:.0f} s: it goes on, and workers wait for it"
    said += [("warning", f"{what} {waits} ({_where(nodes, len(built))})") for what, nodes in late.items()]
    names = sorted({answer["op"] for answers in built.values() for answer in answers.values() if answer})
    return finding("ops", said, f"{', '.join(names)} built and loaded" if names else "none needed", built)


def rehearsal(told: Facts) -> Finding:
    """Judge the dry save and load: `seconds`, or `error`."""
    if "error" in told:
        what = f"step 0 of a small model could not be saved and loaded by the run's ranks: {told['error']}"
        return Finding(name="checkpoint", status="failed", what=what)
    what = f"step 0 of a small model saved and loaded by all ranks in {told['seconds']:.1f} s"
    return Finding(name="checkpoint", status="ok", what=what, figures=dict(told))


def bandwidth(
    rates: Mapping[str, Any], zero_stage: int, on_gpu: bool, step: tuple[int | None, float | None]
) -> Finding:
    """Judge the collectives: `links.Rates`, of each group the slowest rank's.

    Args:
        rates: what was measured; or `error`.
        zero_stage: of the ds config.
        on_gpu: whether GPUs train.
        step: bytes that one rank moves in a step, and its seconds of computing; None where unknown.
    """
    if "error" in rates:
        what = (
            f"the ranks could not exchange tensors: {rates['error']}: do nodes reach each other on all ports?"
        )
        return Finding(name="bandwidth", status="failed", what=what)
    speeds = {
        group: min(max(by_size.values()) for by_size in found.values()) for group, found in rates.items()
    }
    if "all" not in speeds:
        return Finding(name="bandwidth", status="ok", what="one worker: nothing to exchange")
    words = ", ".join(f"{group} {_rate(speed)}" for group, speed in speeds.items())
    said: list[tuple[Status, str]] = []
    figures: dict[str, Any] = {"bytes_per_s": speeds, "measured": dict(rates)}
    moved, compute_s = step
    if moved is not None:
        figures["communication_s"] = seconds = moved / speeds["all"]
        words += f"; {seconds:.3g} s of communication a step"
        if compute_s is not None:
            figures["share"] = share = seconds / (seconds + compute_s)
            words += f" beside {compute_s:.3g} s of computing, {share:.0%} when they do not overlap"
            if share > MOST_COMMUNICATION:
                said.append(("warning", f"ZeRO-{zero_stage} would crawl here ({words}): {_FASTER}"))
    elif on_gpu and zero_stage == 3 and speeds["all"] < SLOW_ZERO3:
        said.append(("warning", f"ZeRO-3 would crawl here ({words}): {_FASTER}"))
    return finding("bandwidth", said, words, figures)


_FASTER = "use a lower ZeRO stage, hpZ (zero_hpz_partition_size), a larger micro-batch or a faster network"


def _rate(speed: float) -> str:
    return f"{speed / 1e9:.3g} GB/s"


def _listed(values: Any) -> str:
    return " to ".join(
        dict.fromkeys(str(value) for value in (min(values, default=0), max(values, default=0)))
    )


def _where(nodes: list[str], num_all: int) -> str:
    return "on every node" if len(nodes) == num_all else f"on {', '.join(nodes)}"


def _differences(status: Status, what: str, values: Mapping[str, Any]) -> list[tuple[Status, str]]:
    if len(set(values.values())) < 2:
        return []
    return [(status, f"{what}: " + ", ".join(f"{value} on {node}" for node, value in values.items()))]
