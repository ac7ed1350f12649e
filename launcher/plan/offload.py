"""Offloading as a ds config asks for it: refused where DeepSpeed would ignore it or fail; and the disk behind it."""

import os
import tempfile
from collections.abc import Mapping
from typing import Any, Literal

from launcher.errors import DsConfigError

KEYS = ("offload_optimizer", "offload_param")
Place = Literal["none", "cpu", "nvme"]
# What older ds configs have instead.
_OLD = {"offload_optimizer": "cpu_offload", "offload_param": "cpu_offload_params"}
_REMEDY = "mount a local NVMe disk there, or write the path of one into a copy of the ds config"


def place(config: Mapping[str, Any], key: str) -> Place:
    """Return where a ds config offloads to.

    Args:
        config: the ds config.
        key: one of `KEYS`.
    """
    section = config.get("zero_optimization") or {}
    device = (section.get(key) or {}).get("device")
    return (
        "nvme" if device == "nvme" else "cpu" if device == "cpu" or section.get(_OLD[key]) is True else "none"
    )


def check(config: Mapping[str, Any], where: str) -> None:
    """Refuse what the ZeRO stage cannot offload, and a disk without a path.

    Raises:
        DsConfigError: with the key and what to do.
    """
    section = config.get("zero_optimization") or {}
    stage = section.get("stage") or 0
    for key in KEYS:
        asked = section.get(key) or {}
        device, path = asked.get("device") or "none", f"zero_optimization.{key}"
        if device == "none":
            continue
        if stage < (3 if key == "offload_param" else 1):
            needs = "stage 3" if key == "offload_param" else "stage 1, 2 or 3"
            raise DsConfigError(
                f'{where}: {path}.device is "{device}", but ZeRO stage {stage} cannot: use {needs}'
            )
        if device == "nvme" and stage < 3:
            raise DsConfigError(
                f'{where}: {path}.device is "nvme", but ZeRO stage {stage} would keep it in the host\'s memory:'
                ' write "cpu", or use stage 3'
            )
        if device == "nvme" and not asked.get("nvme_path"):
            raise DsConfigError(f"{where}: {path}.nvme_path is missing: {_REMEDY}")


def disks(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the directories on local disks that a ds config uses, by their keys."""
    section = config.get("zero_optimization") or {}
    return {
        f"zero_optimization.{key}.nvme_path": str(section[key]["nvme_path"])
        for key in KEYS
        if place(config, key) == "nvme"
    }


def check_disks(config: Mapping[str, Any], where: str) -> None:
    """Try to write where a ds config offloads to; to be called on every machine with workers.

    A missing directory is not made: it would end up on the root disk when the real one is not mounted.

    Raises:
        DsConfigError: with the key, the path and why it cannot be used.
    """
    for key, path in disks(config).items():
        if not os.path.isdir(path):
            why = "is not a directory" if os.path.exists(path) else "does not exist on this machine"
            raise DsConfigError(f'{where}: {key} is "{path}", which {why}: {_REMEDY}')
        try:
            with tempfile.TemporaryFile(dir=path) as file:
                file.write(b"\0" * 4096)
        except OSError as error:
            reason = error.strerror or error
            raise DsConfigError(
                f'{where}: {key} is "{path}", which cannot be written: {reason}: {_REMEDY}'
            ) from error
