"""Figures in words: durations, moments, shares, values. Pure."""

import math
import re
import time
from typing import Any

_SECRETS = (
    # Before the @ of Azure's stand containers, which are no secret and say where to look.
    (re.compile(r"\b(?!(?:abfss?|wasbs?)://)(\w+://)[^/\s'\"]+@"), r"\1***@"),
    # Signatures, tokens, keys: which one is secret is each service's own. A pattern's `?/` is not a query.
    (re.compile(r"([?&][^=&/\s]+=)[^&\s'\"]+"), r"\1***"),
    (re.compile(r"\bhf_\w{16,}"), "hf_***"),
)


def duration(seconds: float) -> str:
    """Return seconds as a person says them: `350 ms`, `12.3 s`, `4 min 05 s`, `2 h 07 min`, `3 d 04 h`."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms" if seconds >= 0.0005 or seconds == 0 else f"{seconds * 1000:.2g} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for unit, small, name, small_name in (
        (86400, 3600, "d", "h"),
        (3600, 60, "h", "min"),
        (60, 1, "min", "s"),
    ):
        if whole >= unit:
            return f"{whole // unit:,} {name} {whole % unit // small:02d} {small_name}"
    return f"{seconds:.1f} s"


def share(part: float) -> str:
    """Return a share in per cent; a small one is not called nothing."""
    if part and part < 0.0005:
        return "< 0.1 %"
    return f"{part * 100:.1f} %"


def value(number: Any) -> str:
    """Return a figure with as many places as one reads."""
    if isinstance(number, bool) or not isinstance(number, int | float):
        return "-" if number is None else str(number)
    if isinstance(number, int):
        return f"{number:,}"
    if not math.isfinite(number):
        return str(number)
    if number == 0 or 0.001 <= abs(number) < 1000:
        return f"{number:.4f}"
    return f"{number:,.1f}" if abs(number) >= 1000 else f"{number:.3g}"


def count(number: float) -> str:
    """Return a count in few letters: `950`, `9,500`, `12.5k`, `3M`, `10.2B`."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(number) >= unit:
            return f"{number / (1e3 if name == 'k' else unit):.4g}{name}"
    return f"{number:,.0f}"


def signed(number: float) -> str:
    """Return a difference with its sign."""
    return f"{number:+.4f}"


def clock(seconds: float) -> str:
    """Return a moment as people of this machine's time zone read it."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def zone() -> str:
    """Return the name of this machine's time zone."""
    return time.strftime("%Z")


def metrics(values: dict[str, float]) -> str:
    """Return metrics as one line."""
    return "  ".join(f"{name} {value:.4f}" for name, value in values.items())


def redacted(text: str) -> str:
    """Return a text without what opens doors: names and passwords in addresses, the values of their queries, and the
    Hub's tokens."""
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text
