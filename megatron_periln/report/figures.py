"""What a figure is: plain data for Plotly, with the colours by name, so that a theme can fill them in.

Series are thinned before they get there: smooth, and no more points than an eye can see.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_periln.report.runs import ReportedRun

__all__ = ["Figure", "Floats", "Panel", "extremes", "limit_line", "numbers", "smooth", "thin", "trace"]

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes; ``traces`` and ``layout`` are Plotly's, a colour is ``@`` and its name."""

    title: str = ""
    traces: list[dict[str, Any]]
    layout: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Panels side by side, and a sentence that says how to read them."""

    name: str
    title: str
    how_to_read: str
    panels: Sequence[Panel]


def trace(index: int, run: ReportedRun, x: Sequence[Any], y: Sequence[Any], **more: Any) -> dict[str, Any]:
    """Return a line of a run's look; ``index`` is the run's, for the legend that shows and hides it."""
    look = {"name": run.name, "x": list(x), "y": list(y), "meta": {"run": index}}
    line = {"color": f"@{run.color}", "dash": run.dash, "width": 2} | more.pop("line", {})
    lines = {} if more.get("mode") == "markers" else {"line": line}
    return {"type": "scatter", "mode": "lines", **look, **lines, **more}


def limit_line(traces: Sequence[dict[str, Any]], level: float, text: str) -> list[dict[str, Any]]:
    """Return a line with a name for a logarithmic axis, as wide as ``traces``; the axes make room for it."""
    ends = [end for line in traces for end in (line["x"][0], line["x"][-1])]
    if not ends:
        return []
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "x": [min(ends), max(ends)],
            "y": [level, level],
            "line": {"color": "@limit", "width": 1.5, "dash": "dash"},
            "hoverinfo": "skip",
        },
        {
            "type": "scatter",
            "mode": "text",
            "x": [min(ends)],
            "y": [level / 1.5],
            "text": [text],
            "textposition": "bottom right",
            "textfont": {"color": "@limit", "size": 11},
            "hoverinfo": "skip",
        },
    ]


def extremes(values: Floats, limit: int) -> Indices:
    """Return at most ``limit`` indices of a series: smallest and largest of each of many equal parts.

    No spike is lost. A part without a finite value keeps its first, so that a gap stays a gap.
    """
    if len(values) <= limit:
        return np.arange(len(values))
    size = math.ceil(len(values) / max(limit // 2, 1))
    parts = math.ceil(len(values) / size)
    finite = np.isfinite(values)

    def within(absent: float) -> Floats:
        padded = np.full(parts * size, absent)
        np.copyto(padded[: len(values)], values, where=finite)
        return padded.reshape(parts, size)

    first = np.arange(parts) * size
    return np.unique([first + within(np.inf).argmin(axis=1), first + within(-np.inf).argmax(axis=1)])


def thin(length: int, limit: int) -> Indices:
    """Return at most ``limit`` evenly spread indices of ``length``, first and last among them."""
    return np.unique(np.linspace(0, length - 1, min(length, limit)).round().astype(np.int64))


def smooth(values: Floats, window: int, at: Indices) -> Floats:
    """Return the centred mean over ``window`` values, of the finite ones, at some; NaN where it is not."""
    window = min(window, len(values))
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite, dtype=np.int32)])
    first = np.clip(at - window // 2, 0, None)
    end = np.clip(at + (window + 1) // 2, None, len(values))
    count = counts[end] - counts[first]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(finite[at] & (count > 0), (sums[end] - sums[first]) / count, np.nan)


def numbers(values: Floats) -> list[float | None]:
    """Return values for JSON, with six digits; None, a gap, for what is not finite."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values.tolist()]
