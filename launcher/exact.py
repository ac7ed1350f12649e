"""Sums that do not depend on their order: of whole numbers, or of multiples of one small fraction."""

from typing import Any

FRACTION = 2.0**20


def rounded(values: Any) -> Any:
    """Round a float64 tensor or array to multiples of 2^-20.

    float64 adds such numbers up exactly, in whatever order ranks do.
    """
    return (values * FRACTION).round() / FRACTION
