"""What a figure is: plain data for Plotly, with the colours by name, so that a theme can fill them in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_periln.report.runs import ReportedRun

__all__ = ["Figure", "Panel", "limit_line", "trace"]


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
