"""Latency and rate from times: the straight line that comes nearest to them, relative to each: small messages count as much as large."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_LEAST_LATENCY_S = 1e-9
"""A latency is above 0; this is less than anything we could time."""

_HIDDEN = 0.05
"""Times that do not grow with the work hide a rate of which the largest amount takes this share of its time; we take that."""


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
    latency, per_unit = 0.0, 0.0
    if len(samples) > 1:
        rows = np.stack([1 / seconds, units / seconds], axis=1)
        latency, per_unit = np.linalg.lstsq(rows, np.ones(len(samples)), rcond=None)[0]
    if latency <= 0:
        speeds = units / seconds
        latency, per_unit = 0.0, speeds.sum() / (speeds**2).sum()
    largest = int(units.argmax())
    if (least := _HIDDEN * seconds[largest] / units[largest]) > per_unit:
        latency, per_unit = 1 / (1 / seconds).mean(), least
    return Line(four_digits(max(float(latency), _LEAST_LATENCY_S)), four_digits(1 / float(per_unit)))


def four_digits(value: float) -> float:
    """Rounded: more would be noise."""
    return float(f"{value:.4g}")
