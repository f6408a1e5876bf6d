"""Bytes and seconds as people read them: three digits, and never more than a unit holds."""

from __future__ import annotations

import pytest

from autoseq.readable import readable_bytes, readable_seconds

SECONDS = {
    "nothing": (0, "0 s"), "less than a microsecond": (5.04e-7, "504 ns"), "microseconds": (1.234e-5, "12.3 µs"),
    "milliseconds": (0.0445, "44.5 ms"), "a hair less than a second": (0.9996, "1 s"), "a hair less than a ms": (9.9996e-4, "1 ms"),
    "seconds": (719.4, "719 s"), "a hair less than a thousand": (999.7, "1,000 s"), "many seconds": (1234.5, "1,234 s"),
}  # fmt: skip
BYTES = {
    "nothing": (0, "0 B"), "bytes": (999, "999 B"), "kilobytes": (1500, "1.5 kB"), "a hair less than a megabyte": (999_950, "1 MB"),
    "gigabytes": (84_933_978_931, "84.9 GB"), "terabytes": (1.5e12, "1.5 TB"),
}  # fmt: skip


@pytest.mark.parametrize(("seconds", "text"), SECONDS.values(), ids=SECONDS)
def test_seconds(seconds: float, text: str) -> None:
    assert readable_seconds(seconds) == text


@pytest.mark.parametrize(("count", "text"), BYTES.values(), ids=BYTES)
def test_bytes(count: float, text: str) -> None:
    assert readable_bytes(count) == text
