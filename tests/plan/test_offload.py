"""Offloading: what a ZeRO stage cannot do is refused, and so is a disk that cannot be written."""

from pathlib import Path
from typing import Any

import pytest

from launcher.errors import DsConfigError
from launcher.plan import offload, zero


def config(stage: int, key: str, **asked: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, key: asked}}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            config(0, "offload_optimizer", device="cpu"),
            'x.json: zero_optimization.offload_optimizer.device is "cpu", but ZeRO stage 0 cannot:'
            " use stage 1, 2 or 3",
        ),
        (
            config(2, "offload_param", device="cpu"),
            'zero_optimization.offload_param.device is "cpu", but ZeRO stage 2 cannot: use stage 3',
        ),
        (
            config(2, "offload_optimizer", device="nvme", nvme_path="/x"),
            "ZeRO stage 2 would keep it in the host's memory",
        ),
        (config(3, "offload_param", device="nvme"), "zero_optimization.offload_param.nvme_path is missing"),
        (
            config(3, "offload_optimizer", device="nvme", nvme_path=None),
            "zero_optimization.offload_optimizer.nvme_path is missing",
        ),
    ],
)
def test_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(DsConfigError) as error:
        zero.check(given, "x.json")
    assert message in str(error.value)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"zero_optimization": {"stage": 2, "offload_optimizer": None}},
        config(0, "offload_param", device="none"),
        config(1, "offload_optimizer", device="cpu"),
        config(3, "offload_param", device="cpu"),
    ],
)
def test_accepted_without_a_disk(given: dict[str, Any]) -> None:
    zero.check(given, "x.json")
    assert offload.disks(given) == {}
    offload.check_disks(given, "x.json")


def test_disks_are_tried(tmp_path: Path) -> None:
    given = config(3, "offload_param", device="nvme", nvme_path=str(tmp_path))
    assert offload.disks(given) == {"zero_optimization.offload_param.nvme_path": str(tmp_path)}
    offload.check_disks(given, "x.json")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_not_there(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for path, why in ((tmp_path / "none", "does not exist on this machine"), (file, "is not a directory")):
        given = config(3, "offload_param", device="nvme", nvme_path=str(path))
        with pytest.raises(DsConfigError) as error:
            offload.check_disks(given, "x.json")
        assert f'x.json: zero_optimization.offload_param.nvme_path is "{path}", which {why}' in str(
            error.value
        )


def test_a_disk_that_cannot_be_written() -> None:
    # Not even root may make files there.
    given = config(3, "offload_param", device="nvme", nvme_path="/proc")
    with pytest.raises(DsConfigError, match='nvme_path is "/proc", which cannot be written: '):
        offload.check_disks(given, "x.json")
