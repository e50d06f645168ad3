"""What the layers show, from the embedding to the last one, at the run's beginning, middle and end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megatron_periln.monitor.statistics import (
    ANGULAR_DISTANCE,
    STREAM_MAX_ABS,
    STREAM_VARIANCE,
    SUBLAYERS,
    Statistic,
    SublayerStatistics,
)
from megatron_periln.report.figures import Figure, Floats, Panel, limit_line, numbers, trace
from megatron_periln.report.runs import ReportedRun
from megatron_periln.report.training_figures import FP16_LARGEST, FP16_TEXT, largest_by_iteration

__all__ = ["depth_figures"]

Values = Callable[[ReportedRun], Floats | None]
"""What a run has of a statistic, ``[intervals, layers]``."""

_SUBLAYERS = [(SUBLAYERS["attention"], "Attention"), (SUBLAYERS["mlp"], "MLP")]
_TIMES = ("beginning", "middle", "end")


def depth_figures(runs: Sequence[ReportedRun]) -> list[Figure]:
    """Return the figures by depth; a run without layers is in none, and no figure is empty."""
    figures = [
        Figure(
            name="variance",
            title="Variance of the residual stream by depth",
            how_to_read="On this logarithmic axis a line that climbs steadily grows exponentially with "
            "depth, one that bends over more slowly, a flat one not at all. Layer 0 is the embedding.",
            panels=_over_time(runs, STREAM_VARIANCE),
        ),
        Figure(
            name="maximum",
            title="Largest activation",
            how_to_read="The closer to the dashed line, the nearer to an overflow in FP16; BF16 and FP32 "
            "have room, but lose digits next to such numbers.",
            panels=[largest_by_iteration(runs), _largest_by_depth(runs)],
        ),
        Figure(
            name="layer-gradients",
            title="Gradient norm by layer",
            how_to_read="The flatter the line, the more evenly gradients spread over the layers; of "
            "attention's and the MLP's parameters together, logarithmic.",
            panels=_over_time(runs, SUBLAYERS["mlp"].gradient_norm, _gradient),
        ),
        Figure(
            name="angular-distance",
            title="Angular distance between consecutive layers",
            how_to_read="0: the layer leaves the stream's direction as it was; 0.5: the stream comes out at "
            "a right angle.",
            panels=_over_time(runs, ANGULAR_DISTANCE),
        ),
        Figure(
            name="ratios",
            title="What a sublayer adds, beside the stream",
            how_to_read="RMS of the sublayer's output, after its output norm, over RMS of the stream that it "
            "is added to, at the end of the run: near 0 the layer hardly changes the stream.",
            panels=[_panel(runs, of.ratio, "end", title) for of, title in _SUBLAYERS],
        ),
        Figure(
            name="output-norm-weights",
            title="Output-norm weights",
            how_to_read="Mean weight of the output norms at the end of the run, with thin lines for minimum "
            "and maximum: weights near 0 switch a sublayer off.",
            panels=[_weights(runs, of, title) for of, title in _SUBLAYERS],
        ),
    ]
    return [figure for figure in figures if any(panel.traces for panel in figure.panels)]


def _recorded(statistic: Statistic) -> Values:
    return lambda run: run.run.layers.values.get(statistic.name)


def _gradient(run: ReportedRun) -> Floats | None:
    """Return the gradient norm of attention's and the MLP's parameters together."""
    parts = [_recorded(of.gradient_norm)(run) for of in SUBLAYERS.values()]
    known = [part for part in parts if part is not None]
    if not known:
        return None
    absent = np.all([np.isnan(part) for part in known], axis=0)
    return np.where(absent, np.nan, np.sqrt(np.nansum([part**2 for part in known], axis=0)))


def _interval(run: ReportedRun, time: str) -> int:
    iterations = run.run.layers.iteration
    if time == "middle":
        return int(np.argmin(np.abs(iterations - (iterations[0] + iterations[-1]) / 2)))
    return 0 if time == "beginning" else -1


def _line(index: int, run: ReportedRun, values: Floats, row: int, **more: Any) -> dict[str, Any] | None:
    """Return a statistic by depth, without the final norm's output, which is not the stream."""
    layers = run.run.layers.layers
    shown = (layers <= run.num_layers) & np.isfinite(values[row])
    if not shown.any():
        return None
    iteration = int(run.run.layers.iteration[row])
    if more.get("mode") != "lines":
        more = {"mode": "lines+markers", "marker": {"size": 4, "color": f"@{run.color}"}, **more}
    template = f"layer %{{x}}, iteration {iteration:,}: %{{y:.4g}}<extra>%{{fullData.name}}</extra>"
    x, y = layers[shown].tolist(), numbers(values[row][shown])
    return trace(index, run, x, y, hovertemplate=template, **more)


def _panel(
    runs: Sequence[ReportedRun], statistic: Statistic, time: str, title: str, values: Values | None = None
) -> Panel:
    """Return the runs' lines at a time, of what they recorded of a statistic, or of ``values`` like it."""
    traces = []
    for index, run in enumerate(runs):
        of_run = (values or _recorded(statistic))(run)
        if of_run is not None and len(of_run):
            line = _line(index, run, of_run, _interval(run, time))
            traces += [line] if line else []
    return Panel(title=title, traces=traces, layout=_axes(statistic))


def _over_time(
    runs: Sequence[ReportedRun], statistic: Statistic, values: Values | None = None
) -> list[Panel]:
    """Return a panel for each time, with the same axes."""
    panels = []
    log = statistic.logarithmic
    for time in _TIMES:
        rows = {
            int(run.run.layers.iteration[_interval(run, time)])
            for run in runs
            if len(run.run.layers.iteration)
        }
        when = f", iteration {rows.pop():,}" if len(rows) == 1 else ""
        panels.append(_panel(runs, statistic, time, f"{time.capitalize()}{when}", values))
    shown = [y for panel in panels for line in panel.traces for y in line["y"] if not log or y > 0]
    if shown:
        low, high = np.log10([min(shown), max(shown)]) if log else (min(0.0, *shown), max(shown))
        margin = 0.05 * (high - low) or 0.5
        for panel in panels:
            panel.layout["yaxis"] |= {"range": [float(low - (margin if log else 0)), float(high + margin)]}
    return panels


def _largest_by_depth(runs: Sequence[ReportedRun]) -> Panel:
    panel = _panel(runs, STREAM_MAX_ABS, "end", "By depth, at the end")
    panel.traces.extend(limit_line(panel.traces, FP16_LARGEST, FP16_TEXT))
    return panel


def _weights(runs: Sequence[ReportedRun], of: SublayerStatistics, title: str) -> Panel:
    traces = []
    for index, run in enumerate(runs):
        values = run.run.layers.values
        for statistic in (of.gain_mean, of.gain_min, of.gain_max):
            of_run = values.get(statistic.name)
            if of_run is None or not len(of_run):
                continue
            thin = {"line": {"width": 1}, "opacity": 0.5, "mode": "lines"}
            line = _line(index, run, of_run, -1, **({} if statistic is of.gain_mean else thin))
            traces += [line] if line else []
    return Panel(title=title, traces=traces, layout=_axes(of.gain_mean))


def _axes(statistic: Statistic) -> dict[str, Any]:
    return {
        "xaxis": {"title": {"text": "layer"}},
        "yaxis": {"title": {"text": statistic.axis}, "type": "log" if statistic.logarithmic else "linear"},
    }
