"""Which files can be read, told from their names."""

from pathlib import PurePosixPath

_KINDS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
# Beside the data of a `datasets` directory: about the data, no rows.
_ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")

READABLE = (
    "a data file ends in .parquet, .arrow, .feather, .ipc, .jsonl, .ndjson or .json, .csv or .tsv"
    " (the last five also with .gz or .zst)"
)


def kind(file: str) -> str:
    """Return "parquet", "arrow", "json" or "csv"; an empty string for what cannot be read."""
    name = _name(file)
    packed = compression(file) is not None
    known = _KINDS.get(PurePosixPath(name.rpartition(".")[0] if packed else name).suffix, "")
    return "" if packed and known in ("parquet", "arrow") else known


def compression(file: str) -> str | None:
    """Return the name of the compression around the whole file, or None."""
    return _COMPRESSIONS.get(PurePosixPath(_name(file)).suffix)


def delimiter(file: str) -> str:
    """Return what stands between the fields of a CSV or TSV file."""
    return "\t" if ".tsv" in PurePosixPath(_name(file)).suffixes[-2:] else ","


def is_data(file: str) -> bool:
    """Tell whether a file found in a directory is one to read: a known format, not hidden."""
    name = PurePosixPath(file).name
    return bool(kind(file)) and not name.startswith((".", "_")) and name not in _ABOUT


def _name(file: str) -> str:
    # In a URI, "?" begins the query.
    return PurePosixPath(file.split("?")[0] if "://" in file else file).name.lower()
