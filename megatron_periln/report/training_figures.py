"""What happens over the iterations: loss, gradient norm, throughput, the largest activation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_periln.monitor.statistics import STREAM_MAX_ABS
from megatron_periln.report.figures import (
    Figure,
    Floats,
    Panel,
    extremes,
    limit_line,
    numbers,
    smooth,
    thin,
    trace,
)
from megatron_periln.report.runs import ReportedRun

__all__ = [
    "FP16_LARGEST",
    "FP16_TEXT",
    "gradient_figure",
    "largest_by_iteration",
    "loss_figure",
    "smoothing_window",
    "throughput_figure",
]

FP16_LARGEST, FP16_TEXT = 65504.0, "FP16's largest number, 65,504"

_RAW_POINTS = 24_000  # of all runs of a figure
_SMOOTH_POINTS = 12_000
_MARKED_SPIKES = 300  # of a run
_HOVER = "%{y:.4g}<extra>%{fullData.name}</extra>"


def smoothing_window(steps: int) -> int:
    """Return the iterations that a smoothed curve averages: one in a hundred, and no fewer than five."""
    return max(5, steps // 100)


def loss_figure(runs: Sequence[ReportedRun]) -> Figure:
    """Return the loss over the iterations, linear, without the fall of the first 5 % and what diverges."""
    panel = _curves(runs, "loss", "loss-spike")
    losses = [run.run.steps.loss[np.isfinite(run.run.steps.loss)] for run in runs]
    if losses := [loss for loss in losses if len(loss)]:
        low = min(float(loss.min()) for loss in losses)
        top = max(float(loss[len(loss) // 20 :].max()) for loss in losses)
        top = min(top, 1.3 * max(float(loss[0]) for loss in losses))
        margin = 0.04 * (top - low) or 0.1
        panel.layout["yaxis"] |= {"range": [low - margin, top + margin]}
    return Figure(
        name="loss",
        title="Loss",
        how_to_read="Lower is better; a triangle marks a spike, a cross NaN or Inf. "
        "Pale lines are single iterations, strong ones their mean over 1 % of the run; "
        "the steep start is cut.",
        panels=[panel],
    )


def gradient_figure(runs: Sequence[ReportedRun]) -> Figure:
    """Return the global gradient norm over the iterations."""
    panel = _curves(runs, "grad_norm", "gradient-spike")
    panel.layout["yaxis"] |= {"type": "log"}
    return Figure(
        name="gradient-norm",
        title="Gradient norm",
        how_to_read="A calm line is a stable run; triangles mark spikes, which often come before those of "
        "the loss. Before clipping, logarithmic.",
        panels=[panel],
    )


def throughput_figure(runs: Sequence[ReportedRun]) -> Figure:
    """Return tokens per second over the iterations."""
    traces = []
    for index, run in enumerate(runs):
        steps = run.run.steps
        rate = _rate(steps.tokens, steps.seconds)
        kept = thin(len(rate), _SMOOTH_POINTS // len(runs))
        x, y = steps.iteration[kept].tolist(), numbers(smooth(rate, smoothing_window(len(rate)), kept))
        traces.append(trace(index, run, x, y, hovertemplate="%{y:,.0f}<extra>%{fullData.name}</extra>"))
    layout = {
        **_iterations("tokens/s"),
        "yaxis": {"title": {"text": "tokens/s"}, "rangemode": "tozero", "tickformat": "~s"},
    }
    return Figure(
        name="throughput",
        title="Throughput",
        how_to_read="Tokens per second of the whole job, mean over 1 % of the run: higher is faster. "
        "It compares runs on the same machines only.",
        panels=[Panel(traces=traces, layout=layout)],
    )


def largest_by_iteration(runs: Sequence[ReportedRun]) -> Panel:
    """Return the largest |x| of all layers over the iterations, with FP16's limit."""
    traces = []
    for index, run in enumerate(runs):
        layers = run.run.layers
        stream = layers.layers <= run.num_layers
        if STREAM_MAX_ABS.name not in layers.values or not stream.any():
            continue
        values = layers.values[STREAM_MAX_ABS.name][:, stream]
        finite = np.isfinite(values)
        largest = np.where(finite.any(axis=1), np.where(finite, values, -np.inf).max(axis=1), np.nan)
        kept = extremes(largest, _SMOOTH_POINTS // len(runs))
        x, y = layers.iteration[kept].tolist(), numbers(largest[kept])
        traces.append(trace(index, run, x, y, hovertemplate=_HOVER))
    layout = _iterations(STREAM_MAX_ABS.axis)
    layout["yaxis"] |= {"type": "log"}
    traces += limit_line(traces, FP16_LARGEST, FP16_TEXT)
    return Panel(title="Largest of all layers, over training", traces=traces, layout=layout)


def _curves(runs: Sequence[ReportedRun], what: str, spike: str) -> Panel:
    traces, marks = [], []
    for index, run in enumerate(runs):
        steps = run.run.steps
        values: Floats = getattr(steps, what)
        x = steps.iteration
        raw = extremes(values, _RAW_POINTS // len(runs))
        faint = {"line": {"width": 1, "dash": "solid"}, "opacity": 0.3, "hoverinfo": "skip"}
        traces.append(trace(index, run, x[raw].tolist(), numbers(values[raw]), **faint))
        kept = thin(len(x), _SMOOTH_POINTS // len(runs))
        mean = numbers(smooth(values, smoothing_window(len(x)), kept))
        marks.append(trace(index, run, x[kept].tolist(), mean, hovertemplate=_HOVER))
        marks += _marks(index, run, values, spike)
    title = {"loss": "loss", "grad_norm": "gradient norm"}[what]
    return Panel(traces=traces + marks, layout=_iterations(title))


def _marks(index: int, run: ReportedRun, values: Floats, spike: str) -> list[dict[str, Any]]:
    """Return markers of the run's spikes, and of NaN where the curve was last seen."""
    # Looked for once for all alerts: their number and that of the iterations grow together.
    finite = np.flatnonzero(np.isfinite(values)) if run.run.alerts else np.empty(0, np.int64)
    iterations = run.run.steps.iteration[finite]
    marks = []
    for kind, symbol in ((spike, "triangle-down"), ("nan", "x")):
        x: list[int] = []
        y: list[float] = []
        text: list[str] = []
        for alert in run.run.alerts:
            if alert["alert"] != kind or len(x) == _MARKED_SPIKES:
                continue
            before = np.searchsorted(iterations, alert["iteration"], side="right")
            if before:
                x.append(alert["iteration"])
                y.append(float(f"{values[finite[before - 1]]:.6g}"))
                text.append(str(alert["message"]))
        if x:
            edge = {"width": 1, "color": "@background"}
            marker = {"symbol": symbol, "size": 10, "color": f"@{run.color}", "line": edge}
            look = {"mode": "markers", "marker": marker, "text": text}
            look["hovertemplate"] = "%{text}<extra>%{fullData.name}</extra>"
            marks.append(trace(index, run, x, y, **look))
    return marks


def _rate(tokens: Floats, seconds: Floats) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        rate = tokens / seconds
    rate[:1] = math.nan if len(rate) > 1 else rate[:1]  # the first iteration starts everything up
    return rate


def _iterations(y_title: str) -> dict[str, Any]:
    return {"xaxis": {"title": {"text": "iteration"}}, "yaxis": {"title": {"text": y_title}}}
