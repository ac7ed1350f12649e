"""What one node sees: machine, versions, disks, storage, model and data. Facts only; nothing hangs."""

import hashlib
import importlib.metadata
import json
import os
import platform
import queue
import shutil
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

import launcher
from launcher.data import places
from launcher.errors import ClusterError, LauncherError

PACKAGES = ("torch", "transformers", "deepspeed", "ray")
PROBE_BYTES = 8 << 20
_SMI_S = 8
_HUB_S = 5
_SHOWS_LATE_S = 5.0
"""How long a shared file system may take to show another node's new file."""
_TOKENIZERS = """
tokenizer.json tokenizer.model spiece.model sentencepiece.bpe.model vocab.txt vocab.json source.spm tekken.json
""".split()

Facts = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What a node is asked to look at.

    Attributes:
        run_root: where the run will be kept.
        folder: below it, to write a file to; it exists.
        scratch: folders of each node's own, such as the ds config's nvme_path.
        limit_s: of each of the things looked at.
    """

    run_root: str
    folder: str
    model_path: str | None
    data_files: tuple[str, ...]
    scratch: tuple[str, ...]
    limit_s: float


def look(asked: Look, name: str) -> Facts:
    """Look at everything from this node, each thing in a thread of its own with a limit.

    Args:
        asked: what to look at.
        name: of the node; its file in `asked.folder` is called so.

    Returns:
        By aspect, its facts, or `{"error": one line}`.
    """
    aspects: dict[str, Callable[[], Facts]] = {
        "machine": lambda: machine(asked.run_root),
        "versions": versions,
        "storage": lambda: write(Path(asked.folder) / name),
        "scratch": lambda: {folder: _scratch(folder) for folder in asked.scratch},
        "data": lambda: data(asked.data_files),
        "model": lambda: model(asked.model_path),
    }
    answers = {each: _begun(function) for each, function in aspects.items()}
    until_s = time.monotonic() + asked.limit_s
    return {each: _ended(answer, until_s, asked.limit_s) for each, answer in answers.items()}


def machine(folder: str) -> Facts:
    """Return cores, memory, disks, and GPUs as nvidia-smi tells them."""
    memory = psutil.virtual_memory()
    limit = _memory_limit()
    disks = (folder, tempfile.gettempdir())
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": os.getloadavg()[0],
        "host_bytes": min(memory.total, limit or memory.total),
        "free_host_bytes": min(memory.available, limit or memory.available),
        "disks": {place: shutil.disk_usage(place).free for place in disks if os.path.exists(place)},
        "gpus": _nvidia_smi(),
    }


def versions() -> dict[str, str]:
    """Return the versions that have to be equal everywhere; the launcher's with a digest of its code."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    digest, root = hashlib.blake2b(digest_size=4), Path(launcher.__file__).parent
    for file in sorted(root.rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return found | {"launcher": f"{launcher.__version__}+{digest.hexdigest()}"}


def check_versions(drivers: Mapping[str, str], host: str) -> None:
    """Refuse to work with other software than the driver's.

    Args:
        drivers: what `versions` returned there.
        host: this one, for the message.

    Raises:
        ClusterError: some differ.
    """
    ours = versions()
    others = [
        f"{name} is {ours.get(name)} there and {version} on the driver"
        for name, version in drivers.items()
        if ours.get(name) != version
    ]
    if others:
        raise ClusterError(f"{host}: {'; '.join(others)}: install the same everywhere, or use one image")


def write(file: Path) -> Facts:
    """Write a file to storage, all the way down; return its digest and the speed."""
    content = os.urandom(PROBE_BYTES)
    started_s = time.monotonic()
    with open(file, "wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())
    rate = PROBE_BYTES / (time.monotonic() - started_s)
    return {"digest": hashlib.blake2b(content).hexdigest(), "bytes_per_s": rate}


def read(file: str, digest: str) -> Facts:
    """Read what another process wrote; return the speed."""
    path, until_s = Path(file), time.monotonic() + _SHOWS_LATE_S
    while not path.exists() and time.monotonic() < until_s:
        time.sleep(0.2)
    started_s = time.monotonic()
    try:
        content = path.read_bytes()
    except OSError as error:
        return {"error": f"{path.name}: {error.strerror}"}
    rate = len(content) / max(time.monotonic() - started_s, 1e-6)
    if hashlib.blake2b(content).hexdigest() != digest:
        return {"error": f"{path.name} has other content there"}
    return {"bytes_per_s": rate}


def second_look(other: tuple[str, str] | None) -> Facts:
    """Read what another node wrote (its file and digest), where there is another; tell the time."""
    return {"read": read(*other) if other else {}, "time": time.time()}


def within(limit_s: float, function: Callable[..., Facts], *args: Any) -> Facts:
    """Return what `function` returns, or `{"error": ...}` when it raises or takes longer than `limit_s`."""
    return _ended(_begun(lambda: function(*args)), time.monotonic() + limit_s, limit_s)


def data(files: Sequence[str]) -> Facts:
    """Return the size of each data file, after reading from it; or what is wrong with it."""

    def one(file: str) -> int | str:
        try:
            places.read_start(file, 1)
            return places.size(file)
        except LauncherError as error:
            return str(error)

    return {"sizes": dict(zip(files, places.for_each(list(files), one), strict=True))} if files else {}


def model(path: str | None) -> Facts:
    """Return what a model directory holds, after reading from every file; a hub id is looked up there."""
    if path is None:
        return {}
    folder = Path(path)
    if not folder.is_absolute():
        return _on_hub(path)
    if not folder.is_dir():
        return {"error": f"{folder}: no such directory"}
    sizes = {}
    for file in sorted(folder.iterdir()):
        if file.is_file():
            with open(file, "rb") as opened:
                opened.read(1 << 16)
            sizes[file.name] = file.stat().st_size
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if "tokenizer.json" in sizes:
            from tokenizers import Tokenizer

            Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises plain exceptions.
        return {"error": f"{folder}: {places.reason(error)}"}
    return {"sizes": sizes, "has_tokenizer": any(name in sizes for name in _TOKENIZERS)}


def _on_hub(name: str) -> Facts:
    import huggingface_hub

    if isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
        return {"hub": "in this node's cache"}
    try:
        huggingface_hub.HfApi().model_info(name, timeout=_HUB_S)
    except Exception as error:  # The client's errors have no common base.
        return {"error": f"{name}: not in this node's cache, and not on the hub: {places.reason(error)}"}
    return {"hub": "reachable"}


def _scratch(folder: str) -> Facts:
    # Not made here: it would be on the root disk when the disk that is meant is not mounted.
    file = Path(folder) / f".probe-{uuid.uuid4().hex[:8]}"
    try:
        return {"bytes_per_s": write(file)["bytes_per_s"], "free_bytes": shutil.disk_usage(folder).free}
    except OSError as error:
        return {"error": f"{folder} cannot be written: {error.strerror}"}
    finally:
        if os.access(folder, os.W_OK):
            file.unlink(missing_ok=True)


def _memory_limit() -> int | None:
    """A container's limit, which the machine's own figures do not show."""
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return int(Path(file).read_text())
        except (OSError, ValueError):
            continue
    return None


def _nvidia_smi() -> list[Facts]:
    if shutil.which("nvidia-smi") is None:
        return []
    fields = ("name", "memory.total", "memory.used", "driver_version")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_S, check=False)
    if told.returncode:
        raise OSError(f"nvidia-smi: {(told.stdout + told.stderr).strip()[:200]}")
    rows = [[cell.strip() for cell in line.split(",")] for line in told.stdout.splitlines() if line.strip()]
    return [
        {"name": name, "bytes": _mib(total), "used_bytes": _mib(used), "driver": driver}
        for name, total, used, driver in rows
    ]


def _mib(text: str) -> int:
    return int(text) << 20 if text.isdigit() else 0


_Answer = queue.SimpleQueue[Facts]


def _begun(function: Callable[[], Facts]) -> _Answer:
    answer: _Answer = queue.SimpleQueue()

    def run() -> None:
        try:
            answer.put(function())
        except Exception as error:
            answer.put({"error": places.reason(error)})

    threading.Thread(target=run, daemon=True).start()
    return answer


def _ended(answer: _Answer, until_s: float, limit_s: float) -> Facts:
    try:
        return answer.get(timeout=max(0.05, until_s - time.monotonic()))
    except queue.Empty:
        return {"error": f"no answer within {limit_s:g} s"}
