"""Latency and rate from times: the straight line that comes nearest to them, relative to each: small messages count as much as large."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_LEAST_LATENCY_S = 1e-9
"""A latency is above 0; this is less than anything we could time."""

_ROUNDS = 30
_SAME = 0.01
"""Relative errors below this count alike."""

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
    """Least squares of the relative errors, where those that do not fit count less, to four digits.

    Both numbers are above 0. Needs a sample, and units and seconds above 0.
    """
    units, seconds = np.array([s.units for s in samples]), np.array([s.seconds for s in samples])
    weights = np.ones(len(samples))
    for _ in range(_ROUNDS):  # reweighted, this tends to the least sum of absolute errors
        latency, per_unit = _least_squares(units / seconds, 1 / seconds, weights)
        weights = 1 / np.sqrt(np.maximum(abs((latency + per_unit * units) / seconds - 1), _SAME))
    largest = int(units.argmax())
    if (least := _HIDDEN * seconds[largest] / units[largest]) > per_unit:
        latency, per_unit = 1 / (1 / seconds).mean(), least
    return Line(four_digits(max(latency, _LEAST_LATENCY_S)), four_digits(1 / per_unit))


def _least_squares(units: np.ndarray, ones: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """The latency, 0 or more, and seconds a unit with which latency * ones + per_unit * units is nearest to 1."""
    if len(weights) > 1:
        rows = np.stack([ones, units], axis=1) * weights[:, None]
        latency, per_unit = np.linalg.lstsq(rows, weights, rcond=None)[0]
        if latency > 0:
            return float(latency), float(per_unit)
    return 0.0, float((weights**2 * units).sum() / (weights**2 * units**2).sum())


def four_digits(value: float) -> float:
    """Rounded: more would be noise."""
    return float(f"{value:.4g}")
