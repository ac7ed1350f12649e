"""What the paths of a recipe stand for: files, patterns, directories, `datasets` directories, hub data sets."""

import fnmatch
import json
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.fs as pafs

from launcher.data import formats, places
from launcher.data.places import Place
from launcher.errors import DataError, nearest

HUB = "hub:"


def list_files(paths: str | list[str], *, split: str | None = None, config: str | None = None) -> list[str]:
    """Return the data files that paths stand for, in the order of `paths`.

    Args:
        paths: local absolute paths, URIs (s3://, gs://, abfs://, hf://, ...), or `hub:NAME` for a data set
            that `datasets.load_dataset` knows. What a directory or a pattern holds is sorted by name; a
            directory's own files only, hidden ones (`.`, `_`) left out. A directory that `save_to_disk` of
            `datasets` wrote is read as such.
        split: of a hub data set or a saved `DatasetDict`; "train" if None.
        config: of a hub data set.

    Returns:
        Paths or URIs, as many as there are files, at least one per given path.

    Raises:
        DataError: there is no such file or split, it cannot be reached, or its format is not known.
    """
    files: list[str] = []
    for path in [paths] if isinstance(paths, str) else paths:
        if path.startswith(HUB):
            files += _of_hub(path, split, config)
            continue
        if config is not None:
            raise DataError(f"{places.shown(path)}: a config is for a data set of the hub ({HUB}NAME)")
        wildcard = re.search(r"\*" if "://" in path else r"[*?[]", places.split_query(path)[0])
        if wildcard and not os.path.exists(path):
            _refuse_split(path, split)
            files += _matches(path, wildcard.start())
        else:
            files += _files_at(path, split)
    return files


def _files_at(path: str, split: str | None) -> list[str]:
    place, info = places.find(path)
    if info.type == pafs.FileType.NotFound:
        raise DataError(f"{places.shown(path)}: {_absence(place)}")
    if info.type == pafs.FileType.Directory:
        return _of_directory(place, split)
    _refuse_split(path, split)
    if not formats.kind(path):
        raise DataError(f"{places.shown(path)}: cannot be read; {formats.READABLE}")
    return [path]


def _of_directory(place: Place, split: str | None) -> list[str]:
    listed = places.list_below(place, recursive=False)
    names = {PurePosixPath(file).name for file in listed}
    if "dataset_dict.json" in names:
        return _of_saved_splits(place, split)
    if {"state.json", "dataset_info.json"} <= names:
        return _of_saved(place, split)
    _refuse_split(place.given, split)
    found = [file for file in listed if formats.is_data(file)]
    if not found:
        raise DataError(f"{places.shown(place.given)}: the directory holds no data file; {formats.READABLE}")
    return [place.child(file) for file in found]


def _of_saved_splits(place: Place, split: str | None) -> list[str]:
    splits = _json(place, "dataset_dict.json").get("splits", [])
    wanted = split or "train"
    if wanted not in splits:
        raise DataError(
            f'{places.shown(place.given)}: has no split "{wanted}"{nearest(wanted, splits)}; it has:'
            f" {', '.join(splits)}"
        )
    inner = f"{place.path.rstrip('/')}/{wanted}"
    return _of_saved(Place(place.child(inner), place.system, inner), None)


def _of_saved(place: Place, split: str | None) -> list[str]:
    state = _json(place, "state.json")
    held = state.get("_split")
    if split is not None and split != held:
        what = f'is the split "{held}" alone' if held else "is one data set, without splits"
        raise DataError(f'{places.shown(place.given)}: {what}, not "{split}": remove the split')
    names = [entry["filename"] for entry in state.get("_data_files", [])]
    if state.get("_indices_data_files") or not names:
        raise DataError(
            f"{places.shown(place.given)}: written by a version of `datasets` that is not read here: load it"
            " and save it again"
        )
    return [place.child(f"{place.path.rstrip('/')}/{name}") for name in names]


def _json(place: Place, name: str) -> dict[str, Any]:
    file = place.child(f"{place.path.rstrip('/')}/{name}")
    with places.open_stream(file) as opened:
        content = opened.read()
    try:
        value = json.loads(content)
    except ValueError as error:
        raise DataError(f"{places.shown(file)}: not valid JSON: {places.reason(error)}") from None
    return value if isinstance(value, dict) else {}


def _of_hub(path: str, split: str | None, config: str | None) -> list[str]:
    import datasets  # slow to import, and seldom needed

    name, wanted = path.removeprefix(HUB), split or "train"
    if not re.fullmatch(r"[\w.\-]+", wanted):
        raise DataError(f'{path}: "{wanted}" is not the name of a whole split')
    try:
        data = datasets.load_dataset(name, config, split=wanted)
    except Exception as error:  # whatever a builder, the network and the hub raise
        raise DataError(f'{path}: split "{wanted}" cannot be loaded: {places.reason(error)}') from None
    files = [str(entry["filename"]) for entry in data.cache_files]
    if not files:
        raise DataError(f'{path}: split "{wanted}" has no files')
    return files


def _refuse_split(path: str, split: str | None) -> None:
    if split is not None:
        raise DataError(
            f'{places.shown(path)}: has no splits, so none is "{split}"; a split is of a {HUB}NAME data set, or'
            " of a directory that DatasetDict.save_to_disk wrote"
        )


def _matches(pattern: str, wildcard: int) -> list[str]:
    bare, query = places.split_query(pattern)
    root = bare[:wildcard].rpartition("/")[0] or ("/" if bare.startswith("/") else ".")
    if "://" in bare and "://" not in root.rstrip("/") + "/":
        raise DataError(f"{places.shown(pattern)}: a pattern can stand for files, not for the bucket")
    wanted = bare[len(root) :].strip("/").split("/")
    place, info = places.find(root + query)
    listed = []
    if info.type == pafs.FileType.Directory:
        listed = places.list_below(place, recursive=len(wanted) > 1 or wanted == ["**"])
    length = len(place.path.rstrip("/"))
    found = [file for file in listed if _glob_match(file[length:].strip("/").split("/"), wanted)]
    if not found:
        what = _absence(place) if info.type == pafs.FileType.NotFound else "no such file"
        raise DataError(f"{places.shown(pattern)}: {what}")
    readable = [file for file in found if formats.is_data(file)]
    if not readable:
        raise DataError(
            f"{places.shown(pattern)}: none of the {len(found)} files found can be read; {formats.READABLE}"
        )
    return [place.child(file) for file in readable]


def _glob_match(names: list[str], wanted: list[str]) -> bool:
    if not names or not wanted:
        return not names and wanted in ([], ["**"])
    if wanted[0] == "**":
        return _glob_match(names, wanted[1:]) or _glob_match(names[1:], wanted)
    return fnmatch.fnmatchcase(names[0], wanted[0]) and _glob_match(names[1:], wanted[1:])


def _absence(place: Place) -> str:
    if "://" not in place.given:
        return f"no such file{_hint(place.path)}"
    bucket = place.path.strip("/").split("/")[0]
    if isinstance(place.system, pafs.S3FileSystem | pafs.GcsFileSystem):
        with places.failures(place.given):
            if place.system.get_file_info(bucket).type == pafs.FileType.NotFound:
                return f'no such bucket "{bucket}", or no right to see it'
    return "no such file"


def _hint(path: str) -> str:
    # Paths are resolved against the recipe; users often mean the directory they stand in.
    parts = Path(path).parts[1:] if os.path.isabs(path) else Path(path).parts
    for start in range(len(parts)):
        near = Path.cwd().joinpath(*parts[start:])
        if near.exists() and str(near) != path:
            return f"; {near} exists: give its absolute path if that is meant"
    return ""
