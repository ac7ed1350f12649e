"""The cluster files as Ray and Kubernetes read them, and the jobs that the documents and manifests start on them."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config

from launcher.options import parser
from tests.conftest import ROOT

CLUSTER = ROOT / "cluster"
CLOUDS = ["aws", "gcp", "azure"]
README = (CLUSTER / "README.md").read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Command:
    """One command line of a document: where it stands, and its words."""

    section: str
    words: list[str]


@dataclass(frozen=True, slots=True)
class Job:
    """One run that somebody is told to start: where, and on how many workers."""

    place: str
    fewest: int
    most: int


def ray_up(name: str) -> dict[str, Any]:
    """Return a `ray up` file as written."""
    return yaml.safe_load((CLUSTER / f"{name}.yaml").read_text(encoding="utf-8"))


def prepared(name: str) -> dict[str, Any]:
    """Return a `ray up` file with Ray's defaults filled in by Ray."""
    return prepare_config(ray_up(name))


def manifests() -> list[tuple[str, dict[str, Any]]]:
    """Return every Kubernetes object with the name of its file."""
    return [
        (path.name, each)
        for path in sorted((CLUSTER / "kubernetes").glob("*.yaml"))
        for each in yaml.safe_load_all(path.read_text(encoding="utf-8"))
    ]


def of_kind(*kinds: str) -> list[Any]:
    """Return the Kubernetes objects of these kinds, as (file, object)."""
    return [(name, each) for name, each in manifests() if each["kind"] in kinds]


def ray_cluster(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the RayCluster of a manifest: itself, or the one that its job makes."""
    if manifest["kind"] == "RayCluster":
        return manifest
    return {
        "kind": "RayCluster",
        "metadata": manifest["metadata"],
        "spec": manifest["spec"]["rayClusterSpec"],
    }


def autoscaling(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return a RayCluster as Ray's autoscaler sees it inside KubeRay."""
    return _derive_autoscaling_config_from_ray_cr(ray_cluster(manifest))


def blocks() -> list[tuple[str, str]]:
    """Return the README's shell blocks, each with the heading that it stands under."""
    found, section, lines = [], "", None
    for line in README.splitlines():
        if lines is None and line.startswith("## "):
            section = line[3:]
        elif line.startswith("```"):
            if lines is None:
                lines = []
            else:
                found.append((section, "\n".join(lines)))
                lines = None
        elif lines is not None:
            lines.append(line)
    return found


def commands(*programs: str) -> list[Command]:
    """Return the README's commands that begin with one of these programs."""
    found = []
    for section, block in blocks():
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0] in programs:
                found.append(Command(section, words))
    return found


def launch(words: list[str]) -> list[str] | None:
    """Return the launcher's arguments in a command line; None: it does not start the launcher."""
    text = shlex.join(words)
    found = re.search(r"python launcher/run\.py(?: (.*))?$", text)
    return shlex.split(found[1] or "") if found else None


def job(place: str, words: list[str]) -> Job | None:
    """Return the job that a command line starts, as the launcher's own parser reads it."""
    arguments = launch(words)
    if arguments is None:
        return None
    workers = parser().parse_args(arguments).workers
    assert workers, f"{place}: {words} does not say --workers, and no GPU is there to be counted"
    return Job(place, *workers)


def submitted() -> list[Job]:
    """Return the jobs that the README submits to clusters of `ray up`, and to the RayCluster that stays."""
    found = [job(each.section, each.words) for each in commands("ray")]
    return [each for each in found if each]


def slurm() -> list[Job]:
    """Return the jobs that the README gives to Slurm."""
    return [each for one in commands("sbatch") if (each := job(one.section, one.words))]


def text_of(path: Path) -> str:
    """Return a file's text."""
    return path.read_text(encoding="utf-8")
