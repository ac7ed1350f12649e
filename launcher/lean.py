"""Imports without what nobody needs: a start is made of imports more than of anything else."""

import contextlib
import functools
import gc
import hashlib
import importlib
import inspect
import marshal
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from launcher import storage

UNNEEDED = ("mlflow", "scipy", "sklearn", "boto3")
"""What libraries import where it happens to be installed, and a run has no use for: DeepSpeed's autotuner takes mlflow,
transformers' losses of object detection scipy, its assisted generation sklearn, which has scipy, and Accelerate's questions
about SageMaker boto3. Each of the first two costs as much as a third of torch."""


CACHE = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "ray-finetune-launcher"
_STRUCTURES, _READS = "transformers.utils.import_utils", "create_import_structure_from_path"


@contextmanager
def imports() -> Iterator[None]:
    """Import within the block as if what is unneeded were not installed, nothing twice, and without looking for garbage.

    Afterwards everything can be imported again. What was imported stays for as long as the process does, so no look for
    garbage goes through it until a stage has ended: DeepSpeed makes one in each start, which took half a second.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        # A look for GPUs through the driver would settle which there are, before Ray has said which are this worker's.
        nvml = _set("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        with without(*UNNEEDED), _one_reading(), _no_source_lines(), nvml:
            yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()


def load(modules: Iterable[str]) -> None:
    """Import modules. What cannot be imported fails again where it is used, and is told there."""
    for module in modules:
        with contextlib.suppress(Exception):
            importlib.import_module(module)


@contextmanager
def without(*names: str) -> Iterator[None]:
    """Have libraries find within the block that these others are not installed, unless they are imported already."""
    hidden = [name for name in names if name not in sys.modules]
    # A module that is None is one that cannot be found (Python's language reference, 5.3.1).
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            if sys.modules.get(name, name) is None:
                del sys.modules[name]


@contextmanager
def _no_source_lines() -> Iterator[None]:
    """Have frames told by file and line alone: torch asks for that of 137 operators, and each time all modules are searched."""
    plain: Any = inspect.getframeinfo
    inspect.getframeinfo = lambda frame, context=1: plain(frame, 0)
    try:
        yield
    finally:
        inspect.getframeinfo = plain


@contextmanager
def _one_reading() -> Iterator[None]:
    """Have transformers read once what its models' files export: each process would open 2,000 files, twice."""
    finder = _OfStructures()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _OfStructures:
    """Finds the module that reads them, as Python would, and has it remember."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See importlib.abc.MetaPathFinder."""
        spec = PathFinder.find_spec(name, path, target) if name == _STRUCTURES else None
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            loader.exec_module = functools.partial(_remembering, loader.exec_module)
        return spec


def _remembering(execute: Callable[[Any], None], module: Any) -> None:
    execute(module)
    reads = getattr(module, _READS, None)
    if reads is None:
        return

    @functools.cache
    def known(folder: str) -> Any:
        # It calls itself, by this name, for each model.
        return _kept(folder, reads) if os.path.basename(folder) == "models" else reads(folder)

    # It takes a package's folder, or a file in it.
    setattr(module, _READS, lambda path: known(os.path.dirname(path) if os.path.isfile(path) else str(path)))


def _kept(folder: str, reads: Callable[[str], Any]) -> Any:
    """Return what a folder's files export, as an earlier process read it if they are still the same by size and time."""
    stamp = _stamp(folder)
    name = hashlib.blake2b(folder.encode(), digest_size=10).hexdigest()
    file = CACHE / f"exports-{name}.{sys.implementation.cache_tag}"
    with contextlib.suppress(OSError, ValueError, EOFError, TypeError):
        then, found = marshal.loads(file.read_bytes())
        if then == stamp:
            return found
    found = reads(folder)
    with contextlib.suppress(OSError, ValueError):
        CACHE.mkdir(parents=True, exist_ok=True)
        with storage.new_file(file) as kept:
            kept.write(marshal.dumps((stamp, found)))
    return found


def _stamp(folder: str) -> bytes:
    seen, folders = hashlib.blake2b(digest_size=16), [folder]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for each in sorted(entries, key=lambda entry: entry.name):
                if each.is_dir():
                    folders += [each.path] if each.name != "__pycache__" else []
                else:
                    status = each.stat()
                    seen.update(f"{each.path} {status.st_size} {status.st_mtime_ns}\n".encode())
    return seen.digest()


@contextmanager
def _set(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
