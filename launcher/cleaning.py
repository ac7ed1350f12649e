"""What of a run root can be freed, and freeing it: never a running run's, never an unfinished run's last checkpoint."""

import os
import re
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import filelock

from launcher import listing, storage
from launcher.listing import Run

STORES = ".store"
RECENT_S = 3600.0
"""Stores used, and files written, since so long are left alone: a run that prepares its data has no directory yet."""
_OLD = re.compile(r"\.old-\d+$")
# What `storage` writes aside before it moves it to its place, and its probes.
_ASIDE = re.compile(r"^\.(.+\.|probe-)[0-9a-f]{8}$")
_COMMIT, _DAMAGED = "commit.json", "damaged.json"
_SAVED, _EXPORTS = ("checkpoints", "best"), ("export", "adapter")


@dataclass(frozen=True, slots=True)
class Item:
    """Something that can be freed.

    Attributes:
        owner: the run or store.
        what: in words.
        paths: to delete.
        bytes: that this frees.
    """

    owner: str
    what: str
    paths: tuple[Path, ...]
    bytes: int


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes on disk of a run."""

    checkpoints: int
    exports: int
    rest: int

    @property
    def all(self) -> int:
        return self.checkpoints + self.exports + self.rest


def sizes(run_dir: Path) -> Sizes:
    """Return what a run takes on disk."""
    saved, exports = (_below(run_dir, names) for names in (_SAVED, _EXPORTS))
    checkpoints, exported = num_bytes(saved), num_bytes(exports)
    return Sizes(checkpoints, exported, max(0, num_bytes([run_dir]) - checkpoints - exported))


def plan(
    root: Path, runs: Sequence[Run], *, named: Collection[str], older_than_s: float, keep_exports: bool
) -> tuple[list[Item], list[str]]:
    """Return what can be freed, and what is kept though one might think otherwise, in words.

    Args:
        root: the run root.
        runs: all of its runs.
        named: only of these, and nothing beside them; empty: of all, and of the stores.
        older_than_s: only what nothing was written to since so long.
        keep_exports: of old directories, free only the checkpoints.
    """
    found: list[Item] = []
    kept: list[str] = []
    for run in runs:
        if named and run.name not in named:
            continue
        if run.state == "running" or not _is_surely_ended(run):
            words = {"running": "is running", "unreadable": f"cannot be read: {run.kind}"}.get(
                run.state, "was written to less than an hour ago"
            )
            kept += [f"{run.name}: {words}"] if named else []
        elif time.time() - run.seen_s >= older_than_s:
            items, reason = _of_run(run, is_named=run.name in named, keep_exports=keep_exports)
            found += items
            kept += [f"{run.name}: {reason}"] if reason else []
    if not named:
        found += _of_root(root, older_than_s)
        going = {path for item in found for path in item.paths}
        stores, reason = _stores(root, [run for run in runs if run.path not in going], older_than_s)
        found += stores
        kept += [reason] if reason else []
    return [item for item in found if item.paths], kept


def free(item: Item, root: Path) -> bool:
    """Delete an item, unless its run goes on, or its store is used, by now; return whether it is gone."""
    try:
        return _free(item, root)
    except OSError:
        return False  # A file of somebody else's.


def _free(item: Item, root: Path) -> bool:
    for path in item.paths:
        owner = next((each for each in (path, *path.parents) if (each / listing.RECIPE).is_file()), None)
        if owner is not None and listing.look(owner, owner.parent).state in ("running", "unreadable"):
            return False
        # Whoever wants a store that is whole only marks it as used.
        is_used = path.parent == root / STORES and time.time() - _newest_s(path) < RECENT_S
        if is_used or _is_locked(path):
            return False
        # Commit records go first: half a deletion must not look like a checkpoint.
        for record in [*path.glob(_COMMIT), *path.glob(f"**/step-*/{_COMMIT}")]:
            storage.delete(record)
        storage.delete(path)
    return not any(path.exists() for path in item.paths)


def num_bytes(paths: Iterable[Path]) -> int:
    """Return the bytes that deleting these would free: of files that are linked from elsewhere, none."""
    seen: dict[tuple[int, int], list[int]] = {}
    for path in paths:
        for file in _files(path):
            try:
                status = file.lstat()
            except OSError:
                continue  # Deleted meanwhile.
            entry = seen.setdefault((status.st_dev, status.st_ino), [0, status.st_nlink, status.st_size])
            entry[0] += 1
    return sum(size for found, links, size in seen.values() if found >= links)


def _of_run(run: Run, *, is_named: bool, keep_exports: bool) -> tuple[list[Item], str]:
    is_old = _OLD.search(run.path.name) is not None
    if is_old and (run.state == "done" or is_named) and not keep_exports:
        return [_item(run.name, "an old run, moved aside by --fresh", [run.path])], ""
    found, reason = [_item(run.name, "leftovers of interrupted writes", _leftovers(run.path))], ""
    if run.state == "done" or is_old and is_named:
        found.append(_item(run.name, "checkpoints of a finished run", _below(run.path, _SAVED)))
    elif is_old:
        reason = "an old run that is unfinished: name it to free it"
    elif is_named:
        reason = f"is unfinished ({run.state}): its checkpoints are kept"
    return found, reason


def _is_surely_ended(run: Run) -> bool:
    """Whether nobody writes there any more: of a lost driver on another machine only time tells."""
    if run.state == "unreadable":
        return False
    return run.state != "driver lost" or time.time() - run.seen_s > RECENT_S


def _leftovers(run_dir: Path) -> list[Path]:
    """Checkpoints that were never committed, and files written aside that were never moved to their place."""
    steps = run_dir.glob("stages/*/*/step-*")
    found = [each for each in steps if not ((each / _COMMIT).exists() or (each / _DAMAGED).exists())]
    return [*found, *_asides([run_dir, *run_dir.glob("stages/*"), *run_dir.glob("stages/*/*")])]


def _asides(folders: Iterable[Path]) -> list[Path]:
    return [
        path
        for folder in folders
        if folder.is_dir()
        for path in folder.iterdir()
        if _ASIDE.match(path.name) and time.time() - _newest_s(path) > RECENT_S
    ]


def _of_root(root: Path, older_than_s: float) -> list[Item]:
    asides = _asides([root, root / STORES, *(root / STORES).glob("*")])
    old = [path for path in asides if time.time() - _newest_s(path) >= older_than_s]
    return [_item(STORES, "leftovers of interrupted writes", old)]


def _stores(root: Path, runs: Sequence[Run], older_than_s: float) -> tuple[list[Item], str]:
    """Token stores and first weights that no unfinished run needs; and why none may go, if so."""
    folders = [path for path in (root / STORES).glob("*-*") if path.is_dir() and path.name[0] != "."]
    if any(_is_locked(path) for path in folders):
        return [], "token stores: a run prepares its data now: none is freed"
    needed = {name for run in runs for name in _bases(run.path)}
    for run in runs:
        if run.state == "done":
            continue
        names = None if run.state == "unreadable" else storage.read_json(run.path / "stores.json")
        if names is None:
            return (
                [],
                f"token stores: {run.name} is unfinished and does not say which it needs: none is freed",
            )
        needed.update(names)
    least_s = max(RECENT_S, older_than_s)
    free = [path for path in folders if path.name not in needed and time.time() - _newest_s(path) >= least_s]
    what = {"tokens": "a token store that no run needs", "model": "first weights that no run needs"}
    kinds = ((path, what.get(path.name.partition("-")[0])) for path in free)
    return [_item(f"{STORES}/{path.name}", words, [path]) for path, words in kinds if words], ""


def _bases(run_dir: Path) -> Iterator[str]:
    """Names of the first weights that adapters lie on: without these they are worth nothing, however done the run is."""
    for path in run_dir.glob("stages/*/adapter/adapter_config.json"):
        config = storage.read_json(path)
        base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
        if isinstance(base, str):
            yield Path(base).name


def _is_locked(store: Path) -> bool:
    if not (store / ".lock").exists():
        return False
    lock = filelock.FileLock(store / ".lock")
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        return True
    lock.release()
    return False


def _item(owner: str, what: str, paths: Sequence[Path]) -> Item:
    return Item(owner, what, tuple(paths), num_bytes(paths))


def _below(run_dir: Path, names: Iterable[str]) -> list[Path]:
    return [path for name in names for path in sorted(run_dir.glob(f"stages/*/{name}"))]


def _files(path: Path) -> Iterator[Path]:
    if not path.is_dir() or path.is_symlink():
        yield path
        return
    for folder, _, names in os.walk(path):
        yield from (Path(folder) / name for name in names)


def _newest_s(path: Path) -> float:
    """Return when anything in it was last written."""
    times = [0.0]
    for file in [path, *_files(path)]:
        try:
            times.append(file.lstat().st_mtime)
        except OSError:
            continue
    return max(times)
