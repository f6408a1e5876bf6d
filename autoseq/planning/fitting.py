"""Latency and rate from times: the straight line that comes nearest to them, relative to each: small messages count as much as large."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_LEAST_LATENCY_S = 1e-9
"""A latency is above 0; this is less than anything we could time."""


@dataclass(frozen=True, slots=True)
class Sample:
    """`units` of work (bytes, operations) took `seconds`, with one message or call."""

    units: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Line:
    """seconds = latency_s + units / units_per_s."""

    latency_s: float
    units_per_s: float


def fit_line(samples: Sequence[Sample]) -> Line:
    """Least squares of the relative errors, with both numbers above 0, to four digits. Needs a sample, and units and seconds above 0."""
    units, seconds = np.array([s.units for s in samples]), np.array([s.seconds for s in samples])
    rows = np.stack([1 / seconds, units / seconds], axis=1)
    latency, per_unit = np.linalg.lstsq(rows, np.ones(len(samples)), rcond=None)[0] if len(samples) > 1 else (0.0, 0.0)
    if per_unit <= 0:  # times that do not grow with the work: all of it is latency but for what the largest may have taken
        largest = int(units.argmax())
        per_unit = seconds[largest] / units[largest]
        latency = min(float(seconds.min()), max(latency, 0.0)) if len(samples) > 1 else 0.0
    elif latency <= 0:
        per_unit = float((units / seconds).sum() / ((units / seconds) ** 2).sum())
    return Line(four_digits(max(latency, _LEAST_LATENCY_S)), four_digits(1 / per_unit))


def four_digits(value: float) -> float:
    """Rounded: more would be noise."""
    return float(f"{value:.4g}")
