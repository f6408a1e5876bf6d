"""Bytes and seconds as people read them, in three digits."""

from __future__ import annotations

from autoseq.planning.choice import three_digits


def readable_bytes(count: float) -> str:
    """`1.5 MB`; powers of 1000, as network and memory vendors count."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(three_digits(count)) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} TB" if count < 1000 else f"{count:,.0f} TB"


def readable_seconds(seconds: float) -> str:
    """`12.3 ms`."""
    if three_digits(seconds) >= 1000:
        return f"{seconds:,.0f} s"
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if three_digits(seconds * factor) >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns" if seconds else "0 s"
