"""DeepSpeed's compiled ops: which ones a ds config needs, and their building."""

import fcntl
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.plan import offload

LOCK = ".launcher-build.lock"
_POLL_S = 0.25
KILLED_AFTER_S = 600.0
_REMEDIES = {
    "async_io": "install libaio with its headers (libaio-dev, or libaio-devel), or offload to the CPU",
    "gds": "install NVIDIA GPUDirect Storage, or leave out aio.use_gds",
}
_REMEDY = "a C++ compiler and ninja are needed on the path, for GPUs also nvcc of torch's CUDA version"


def needed(ds_config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of DeepSpeed's op builders that a run will load.

    Args:
        ds_config: completed, as the plan has it.
    """
    zero = ds_config.get("zero_optimization") or {}
    places = {key: offload.place(ds_config, key) for key in offload.KEYS}
    names = [_of_optimizer(ds_config.get("optimizer") or {}, places["offload_optimizer"] != "none")]
    if "nvme" in places.values():
        names += ["PinMemoryBuilder", "AsyncIOBuilder"]  # The second one loads the first.
        if (ds_config.get("aio") or {}).get("use_gds"):
            names.append("GDSBuilder")
    if any(str(key).startswith("zero_quantized_") and value for key, value in zero.items()):
        names.append("QuantizerBuilder")
    if (ds_config.get("compile") or {}).get("deepcompile"):
        names.append("DeepCompileBuilder")
    return tuple(name for name in names if name)


def _of_optimizer(section: Mapping[str, Any], is_offloaded: bool) -> str | None:
    """As `DeepSpeedEngine._configure_basic_optimizer` chooses."""
    kind, params = str(section.get("type") or "").lower(), section.get("params") or {}
    if kind in ("adam", "adamw", "muon"):
        if params.get("torch_adam"):
            return None
        return "CPUAdamBuilder" if is_offloaded else "FusedAdamBuilder"
    if kind == "lion":
        return "CPULionBuilder" if is_offloaded else "FusedLionBuilder"
    if kind == "adagrad":
        return "CPUAdagradBuilder" if is_offloaded else None
    return "FusedLambBuilder" if kind == "lamb" else None


def build_all(builders: Sequence[str], device: str, wait_s: float) -> dict[str, Any]:
    """Build ops one after the other in a process of their own; return `{"builds": answers by builder}`.

    Args:
        builders: names of `needed`.
        device: "cuda" or "cpu".
        wait_s: how long to wait for other processes that compile.
    """
    until_s = time.monotonic() + wait_s
    # As the workers have it: the compiler's helpers of this environment on the path.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    elif not os.environ.get("CUDA_VISIBLE_DEVICES"):
        # The builders look at the GPUs, which Ray may hide from a task that asks for none.
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    return {"builds": {each: build(each, until_s - time.monotonic()) for each in builders}}


def build(builder: str, wait_s: float) -> dict[str, Any]:
    """Build and load one op in this process; one that is built already is only loaded.

    Never beside another build of ours on this node; what another process compiles is waited for.

    Args:
        builder: a name of `needed`.
        wait_s: how long to wait for another process that compiles the same op.

    Returns:
        `op`, `seconds`, and in one line or None: `error`, what is wrong and what to do; `late`, who is still
        compiling it.
    """
    from deepspeed.accelerator import get_accelerator

    started_s = time.monotonic()
    op = get_accelerator().create_op_builder(builder)
    name = builder.removesuffix("Builder") if op is None else op.name
    answer: dict[str, str | None] = {"error": None, "late": None}
    if op is None or type(op).__name__ == "NotImplementedBuilder":
        answer["error"] = (
            f"DeepSpeed has no {builder} for this accelerator: choose another optimizer or offload"
        )
    else:
        answer |= _build(op, started_s + wait_s)
    return {"op": name, "seconds": time.monotonic() - started_s} | answer


def forget_killed_builds(ds_config: Mapping[str, Any], old_s: float = KILLED_AFTER_S) -> None:
    """Delete the locks of builds that were killed, before DeepSpeed waits for them for ever.

    A lock that a process here holds is left alone, and a young one too: another node may compile in the same folder.

    Args:
        ds_config: completed, as the plan has it.
        old_s: seconds after which no build goes on any more.
    """
    if not (builders := needed(ds_config)):
        return
    from deepspeed.accelerator import get_accelerator
    from torch.utils.cpp_extension import _get_build_directory

    for builder in builders:
        op = get_accelerator().create_op_builder(builder)
        if op is None:
            continue
        lock = Path(_get_build_directory(op.name, False)) / "lock"
        while not _forgotten(lock, old_s) and _holder(lock) is None:
            time.sleep(_POLL_S)


def _forgotten(lock: Path, old_s: float = KILLED_AFTER_S) -> bool:
    """Delete the lock of a build that was killed; tell whether there is none now."""
    if lock.exists() and _age_s(lock) > old_s and _holder(lock) is None:
        logging.getLogger(__name__).warning("%s: the build was killed; it is made again", lock)
        lock.unlink(missing_ok=True)
    return not lock.exists()


def _build(op: Any, until_s: float) -> dict[str, str | None]:
    from deepspeed.git_version_info import installed_ops
    from torch.utils.cpp_extension import _get_build_directory

    folder = Path(_get_build_directory(op.name, False))
    with open(folder.parent / LOCK, "w") as ours:
        if not _waited(lambda: _take(ours), until_s):
            return {"late": f"another pre-flight compiles in {folder.parent}"}
        # torch waits for ever for its own lock, also for one that a killed process left behind.
        theirs = folder / "lock"
        if not _waited(lambda: _forgotten(theirs), until_s):
            if (holder := _holder(theirs)) is not None:
                return {"late": f"process {holder} compiles it"}
            return {
                "error": f"{theirs} is {_age_s(theirs):,.0f} s old and no process here holds it: one that compiled"
                f" was killed, and every worker would wait until it is {KILLED_AFTER_S:,.0f} s old: delete this file,"
                " unless another node compiles in the same folder"
            }
        try:
            if not installed_ops.get(op.name) and not op.is_compatible(verbose=True):
                return {"error": _why(op, RuntimeError(op.error_log or "this machine cannot have it"))}
            op.load(verbose=False)
        except Exception as error:  # Builders raise whatever their tools do.
            return {"error": _why(op, error)}
    return {}


def _holder(lock: Path) -> int | None:
    """The process that has the file open, as one that compiles has."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if link.readlink() == lock:
                return int(link.parts[2])
        except OSError:
            continue
    return None


def _take(file: Any) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _waited(condition: Any, until_s: float) -> bool:
    while not condition():
        if time.monotonic() > until_s:
            return False
        time.sleep(_POLL_S)
    return True


def _age_s(file: Path) -> float:
    try:
        return time.time() - file.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _why(op: Any, error: Exception) -> str:
    """One line out of a compiler's page."""
    if op.name in _REMEDIES:
        return f"cannot be built here: {_REMEDIES[op.name]}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    told = [line for line in lines if "error:" in line or "not found" in line or "cannot find" in line]
    return f"{(told or lines)[0][:300].removesuffix(' None').rstrip('.')}: {_REMEDY}"
