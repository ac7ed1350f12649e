"""The workers' process group under Ray Train. Ray's own TorchConfig has driver and controller import torch; this has not."""

import logging
import os
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions
from ray._private.ray_constants import env_integer
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.constants import (
    DEFAULT_TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S,
    TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S,
)


@dataclass(frozen=True, slots=True)
class Collectives(BackendConfig):
    """How the workers talk to each other.

    Attributes:
        backend: nccl or gloo.
        timeout_s: after which a collective that does not end is an error.
    """

    backend: str
    timeout_s: int

    @property
    def backend_cls(self) -> type[Backend]:
        """See Ray Train."""
        return _Torch

    @property
    def train_func_context(self) -> type["OnItsDevice"]:
        """See Ray Train."""
        return OnItsDevice


class OnItsDevice:
    """Around the training on a worker: its GPU is the default one."""

    def __enter__(self) -> None:
        from ray.train.torch.config import TorchConfigContextManager

        TorchConfigContextManager().__enter__()

    def __exit__(self, *_: object) -> None:
        return None


class _Torch(Backend):
    """In the controller: has the workers join, and leave. What they do there is Ray's own code."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """See Ray Train."""
        address, port = worker_group.execute_single(0, get_address_and_port)
        size = len(worker_group)
        joining = [
            worker_group.execute_single_async(rank, _join, backend_config, address, port, rank, size)
            for rank in range(size)
        ]
        ray.get(joining)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """See Ray Train."""
        leaving = worker_group.execute_async(_leave, len(worker_group) > 1)
        limit_s = env_integer(
            TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S, DEFAULT_TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S
        )
        try:
            ray.get(leaving, timeout=limit_s)
        except ray.exceptions.GetTimeoutError:
            logging.getLogger(__name__).warning("the process group did not end within %d s", limit_s)


def _join(asked: Collectives, address: str, port: int, rank: int, size: int) -> None:
    from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group

    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address, str(port)
    _set_torch_distributed_env_vars()
    _setup_torch_process_group(asked.backend, rank, size, "env://", asked.timeout_s)


def _leave(is_group: bool) -> None:
    from ray.train.torch.config import _shutdown_torch

    _shutdown_torch(destroy_process_group=is_group)
