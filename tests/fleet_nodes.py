"""Nodes of a `tests.fleet`, as Ray's autoscaler starts and ends them in its own process."""

import functools
import os
import tempfile
from typing import Any

import pytest
import ray._private.parameter
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class Nodes(FakeMultiNodeProvider):
    """Raylets on this machine, each with a folder of its own, as machines have disks of their own.

    Else a node that comes unpacks a job's working directory once more in the place where the job runs.
    """

    def _create_node_with_resources_and_labels(self, *arguments: Any) -> None:
        folder = tempfile.mkdtemp(prefix="n-", dir=os.environ["RAY_TMPDIR"])
        of_its_own = functools.partial(ray._private.parameter.RayParams, temp_dir=folder)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ray._private.parameter, "RayParams", of_its_own)
            super()._create_node_with_resources_and_labels(*arguments)
