"""Which rows of what was read are kept: those that pass the filters, those of one part of a split."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from launcher.data import places
from launcher.errors import DataError, nearest

Filter: TypeAlias = Sequence[Any]
OPERATORS = ("==", "!=", "<", ">", "<=", ">=", "in", "not in")

_ROW = "\0row"


def columns(filters: Sequence[Filter] | None) -> list[str]:
    """Return the names of the columns that filters look at.

    Raises:
        DataError: one is not `[column, operator, value]`.
    """
    for one in filters or ():
        is_triple = isinstance(one, list | tuple) and len(one) == 3 and isinstance(one[0], str)
        if not is_triple or one[1] not in OPERATORS:
            raise DataError(f"filter {_text(one)}: must be [column, operator, value] with {_known()}")
        if one[1] in ("in", "not in") and not (isinstance(one[2], list | tuple | set) and one[2]):
            raise DataError(f'filter {_text(one)}: "{one[1]}" wants a list of values')
    return list(dict.fromkeys(one[0] for one in filters or ()))


def check(file: str, filters: Sequence[Filter], types: Mapping[str, pa.DataType | None]) -> None:
    """Check filters against the columns of a file; a column of type None may hold anything.

    Raises:
        DataError: there is no such column, or it cannot be compared with the value.
    """
    columns(filters)
    for one in filters:
        if one[0] not in types:
            raise DataError(
                f'filter {_text(one)}: {places.shown(file)} has no column "{one[0]}"{nearest(one[0], types)};'
                f" it has: {', '.join(types)}"
            )
        kind = types[one[0]]
        if kind is not None:
            kept(file, [one], {one[0]: pa.array([], kind)}, 0)


def kept(
    file: str, filters: Sequence[Filter], held: Mapping[str, pa.Array | list[Any]], num_rows: int
) -> np.ndarray:
    """Return which of some rows pass all filters, as ascending indices; a null passes "not in" alone.

    Args:
        file: where the rows come from, for messages.
        filters: each `[column, operator, value]`.
        held: the columns by name; one that is missing is null throughout.
        num_rows: how many rows there are.

    Raises:
        DataError: a column and a value cannot be compared.
    """
    indices = np.arange(num_rows)
    for one in filters:
        name, operator, value = one
        try:
            array = _array(held.get(name), value, num_rows).take(pa.array(indices))
            table = pa.table({name: array, _ROW: indices})
            expression = pq.filters_to_expression([(name, operator, _as_column(value, array.type))])
            indices = table.filter(expression)[_ROW].to_numpy()
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise DataError(
                f'filter {_text(one)}: {places.shown(file)}: column "{name}" cannot be compared with'
                f" {_text(value)}: {places.reason(error)}"
            ) from None
    return indices


def in_part(file: str, numbers: Sequence[int] | np.ndarray, part: tuple[float, float]) -> np.ndarray:
    """Return for each row whether it is in a part: a pure function of the file's name and its number.

    Args:
        file: its base name is what counts, so a part stays the same where a data set is moved.
        numbers: rows, or byte offsets of lines.
        part: `(low, high)` within 0 to 1; parts that do not overlap have no row in common.
    """
    name = PurePosixPath(places.split_query(file)[0]).name
    key = np.uint64(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little"))
    # splitmix64: every bit of the number reaches every bit of the hash.
    mixed = np.asarray(numbers, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    place = ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53
    return np.asarray((part[0] <= place) & (place < part[1]))


def _as_column(value: Any, kind: pa.DataType) -> Any:
    """Return dates and times as the column holds them: in a recipe they are text."""
    if not pa.types.is_temporal(kind):
        return value
    if isinstance(value, list | tuple | set):
        return [_as_column(each, kind) for each in value]
    return pa.scalar(str(value)).cast(kind).as_py() if isinstance(value, str) else value


def _array(column: pa.Array | list[Any] | None, value: Any, num_rows: int) -> pa.Array:
    array = pa.nulls(num_rows) if column is None else column
    array = pa.array(array) if isinstance(array, list) else array
    if pa.types.is_null(array.type):
        some = next(iter(value)) if isinstance(value, list | tuple | set) else value
        return pa.nulls(num_rows, pa.scalar(some).type)
    return array


def _text(value: Any) -> str:
    return repr(value)[:200].replace("'", '"')


def _known() -> str:
    return "an operator of " + ", ".join(OPERATORS)
