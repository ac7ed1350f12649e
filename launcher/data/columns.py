"""The columns of the files: their names and types, and whether all files agree."""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from launcher.data import csv_files, filters, formats, json_lines, places, tables
from launcher.errors import DataError

# Headers of typed files are read for all; where names are looked up in the text, so many files speak for all.
_MOST_TEXT_FILES = 64


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of one file by name; the type is None where rows may differ."""

    file: str
    types: dict[str, pa.DataType | None]


def column_names(files: Sequence[str], needed: Sequence[str] | None = None) -> list[str]:
    """Return the columns of the first file: of its header, or the keys of its first JSON lines.

    Args:
        files: what `list_files` returned.
        needed: compare only these columns among the files; None: all that there are.

    Raises:
        DataError: a file is not readable, lacks a column that the first one has, or has it of another type.
    """
    known = [found for found in _of_files(files) if found.types]
    if not known:
        return []
    typed: Columns | None = None
    for found in known:
        if formats.kind(found.file) == "json":
            _check_keys(found, known[0], needed)
            continue
        typed = typed or found
        _check_names(found, typed, needed)
        _check_types(found, typed, needed)
    return list(known[0].types)


def check_filters(files: Sequence[str], wanted: Sequence[filters.Filter]) -> None:
    """Check that filters are well formed, name columns that the files have, and can be compared.

    Raises:
        DataError: they do not; names the filter.
    """
    filters.columns(wanted)
    for found in _of_files(files):
        if found.types:
            filters.check(found.file, wanted, found.types)


def of_file(file: str) -> Columns:
    """Return the columns of one file.

    Raises:
        DataError: it is not readable, or two columns have one name.
    """
    kind = formats.kind(file)
    if kind == "json":
        return Columns(file, dict.fromkeys(json_lines.first_names(file)))
    schema = csv_files.schema(file) if kind == "csv" else tables.schema(file)
    twice = [name for name in schema.names if schema.names.count(name) > 1]
    if twice:
        raise DataError(f'{places.shown(file)}: has two columns named "{twice[0]}": rename one')
    return Columns(file, {field.name: field.type for field in schema})


def _of_files(files: Sequence[str]) -> list[Columns]:
    texts = [i for i, file in enumerate(files) if formats.kind(file) in ("json", "csv")]
    step = -(-len(texts) // _MOST_TEXT_FILES) or 1
    unasked = set(texts) - set(texts[::step])
    return places.for_each([file for i, file in enumerate(files) if i not in unasked], of_file)


def _check_keys(found: Columns, first: Columns, needed: Sequence[str] | None) -> None:
    # A key may be left out where a line has nothing for it; a file without any is another data set.
    wanted = set(first.types if needed is None else needed)
    if wanted and not wanted & set(found.types):
        raise DataError(_difference(found, first))


def _check_names(found: Columns, first: Columns, needed: Sequence[str] | None) -> None:
    for name in [*first.types, *found.types] if needed is None else needed:
        if (name in first.types) != (name in found.types):
            raise DataError(_difference(found, first))


def _difference(found: Columns, first: Columns) -> str:
    names, others = ", ".join(found.types), ", ".join(first.types)
    return f"{places.shown(found.file)}: its columns ({names}) are not those of {places.shown(first.file)} ({others})"


def _check_types(found: Columns, first: Columns, needed: Sequence[str] | None) -> None:
    if "csv" in (formats.kind(found.file), formats.kind(first.file)):
        return  # guessed from the values, which may be of another type in every file
    for name in found.types if needed is None else needed:
        one, other = found.types.get(name), first.types.get(name)
        if one is not None and other is not None and not are_compatible(one, other):
            raise DataError(
                f'{places.shown(found.file)}: its column "{name}" is {one}, but {other} in'
                f" {places.shown(first.file)}: write both files with one type"
            )


def are_compatible(one: pa.DataType, other: pa.DataType) -> bool:
    """Return whether values of two types become the same kind of Python values."""
    one, other = _plain(one), _plain(other)
    if one == other or pa.types.is_null(one) or pa.types.is_null(other):
        return True
    if pa.types.is_struct(one) and pa.types.is_struct(other):
        # Optional keys come and go from file to file.
        shared = {field.name for field in one} & {field.name for field in other}
        return all(are_compatible(one.field(name).type, other.field(name).type) for name in shared)
    if _is_list(one) and _is_list(other):
        return are_compatible(one.value_type, other.value_type)
    families = (
        pa.types.is_integer,
        pa.types.is_floating,
        _is_text,
        _is_binary,
        pa.types.is_timestamp,
        pa.types.is_decimal,
        pa.types.is_date,
        pa.types.is_time,
        pa.types.is_duration,
        pa.types.is_map,
    )
    return any(family(one) and family(other) for family in families)


def _plain(kind: pa.DataType) -> pa.DataType:
    if isinstance(kind, pa.BaseExtensionType):
        return _plain(kind.storage_type)
    return _plain(kind.value_type) if pa.types.is_dictionary(kind) else kind


def _is_list(kind: pa.DataType) -> bool:
    return hasattr(kind, "value_type") and "list" in str(kind).split("<")[0]


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return any(
        is_kind(kind)
        for is_kind in (
            pa.types.is_binary,
            pa.types.is_large_binary,
            pa.types.is_binary_view,
            pa.types.is_fixed_size_binary,
        )
    )
