"""Series as points for a picture: smooth, and no more of them than an eye can see."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

__all__ = ["extremes", "numbers", "smooth", "thin"]

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


def extremes(values: Floats, limit: int) -> Indices:
    """Return at most ``limit`` indices of a series: smallest and largest of each of many equal parts.

    No spike is lost. A part without a finite value keeps its first, so that a gap stays a gap.
    """
    if len(values) <= limit:
        return np.arange(len(values))
    parts = max(limit // 2, 1)
    edges = np.linspace(0, len(values), parts + 1).astype(np.int64)
    finite = np.isfinite(values)
    low, high = np.where(finite, values, np.inf), np.where(finite, values, -np.inf)
    kept = set()
    for first, end in pairwise(edges.tolist()):
        kept.add(first + int(np.argmin(low[first:end])))
        kept.add(first + int(np.argmax(high[first:end])))
    return np.array(sorted(kept), dtype=np.int64)


def thin(length: int, limit: int) -> Indices:
    """Return at most ``limit`` evenly spread indices of ``length``, first and last among them."""
    return np.unique(np.linspace(0, length - 1, min(length, limit)).round().astype(np.int64))


def smooth(values: Floats, window: int) -> Floats:
    """Return the centred mean over ``window`` values, of the finite ones; NaN where none is."""
    window = min(window, len(values))
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    centre = np.arange(len(values))
    first = np.clip(centre - window // 2, 0, None)
    end = np.clip(centre + (window + 1) // 2, None, len(values))
    count = counts[end] - counts[first]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(finite & (count > 0), (sums[end] - sums[first]) / count, np.nan)


def numbers(values: Floats) -> list[float | None]:
    """Return values for JSON, with six digits; None, a gap, for what is not finite."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values.tolist()]
