"""A curve in characters: braille dots, or rows of plain ones where the terminal has no others. Pure."""

import math
from collections.abc import Sequence

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Of a braille character, by row and column."""
_PLAIN = "_.-~^"


def braille(values: Sequence[float], width: int, height: int) -> list[str]:
    """Return a curve as `height` lines of `width` characters, each two points wide and four high.

    Args:
        values: finite or not; those that are not leave a gap.
    """
    points = resampled(values, 2 * width)
    rows = [[0] * width for _ in range(height)]
    for x, level in enumerate(_levels(points, 4 * height)):
        if level is None:
            continue
        y = 4 * height - 1 - level
        rows[y // 4][x // 2] |= _DOTS[y % 4][x % 2]
    return ["".join(chr(0x2800 + dots) for dots in row) for row in rows]


def plain(values: Sequence[float], width: int) -> list[str]:
    """Return a curve as one line of `width` plain characters."""
    levels = _levels(resampled(values, width), len(_PLAIN))
    return ["".join(" " if level is None else _PLAIN[level] for level in levels)]


def resampled(values: Sequence[float], num_points: int) -> list[float]:
    """Return means of neighbours, so that there are as many points as asked for; fewer values are drawn out."""
    if not values:
        return []
    points = []
    for i in range(num_points):
        first = i * len(values) // num_points
        last = max(first + 1, (i + 1) * len(values) // num_points)
        near = [value for value in values[first:last] if math.isfinite(value)]
        points.append(sum(near) / len(near) if near else math.nan)
    return points


def _levels(points: Sequence[float], num_levels: int) -> list[int | None]:
    """Place points between their least and their largest."""
    finite = [point for point in points if math.isfinite(point)]
    least, largest = min(finite, default=0.0), max(finite, default=0.0)
    span = (largest - least) or 1.0
    return [
        round((point - least) / span * (num_levels - 1)) if math.isfinite(point) else None for point in points
    ]
