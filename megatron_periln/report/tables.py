"""The report's tables, as rows of text: a summary, the flags that differ, the alerts, and remarks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_periln.monitor.statistics import STREAM_MAX_ABS, STREAM_VARIANCE
from megatron_periln.report.runs import ReportedRun

__all__ = ["Table", "alert_table", "flag_table", "remarks", "summary_table"]

# Flags that differ between any two runs and say nothing of the training.
_NOT_TOLD = frozenset(
    [
        "data_cache_path",
        "local_rank",
        "log_dir",
        "load",
        "monitor_file",
        "rank",
        "save",
        "save_dir",
        "tensorboard_dir",
        "wandb_exp_name",
        "wandb_save_dir",
        "one_logger_run_name",
    ]
)
_LONGEST_VALUE = 120


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of cells; the first cell names the row, ``colors`` are those of the rows' or columns' runs."""

    head: list[str]
    rows: list[list[str]]


def summary_table(runs: Sequence[ReportedRun]) -> Table:
    """Return a row a run: what it is and how it went."""
    head = [
        "Run", "Model", "Iterations", "Tokens", "Final loss", "Loss spikes", "Gradient spikes", "Largest |x|",
        "Variance, last layer", "Tokens/s",
    ]  # fmt: skip
    return Table(head=head, rows=[_summary(run) for run in runs])


def _summary(run: ReportedRun) -> list[str]:
    header, steps = run.run.header, run.run.steps
    model = f"{header['placement']}, {run.num_layers} layers"
    if isinstance(header.get("hidden_size"), int):
        model += f" x {header['hidden_size']:,}"
    if isinstance(header.get("parameters"), int):
        model += f", {_short(header['parameters'])} parameters"
    count = Counter(alert["alert"] for alert in run.run.alerts)
    with np.errstate(invalid="ignore", divide="ignore"):
        rate = steps.tokens[1:] / steps.seconds[1:]
    rate = rate[np.isfinite(rate)]
    return [
        run.name,
        model,
        f"{steps.iteration[-1]:,}",
        _short(float(np.nansum(steps.tokens))),
        _final_loss(run),
        f"{count['loss-spike']:,}",
        f"{count['gradient-spike']:,}",
        _largest(run),
        _variance(run),
        f"{np.median(rate):,.0f}" if len(rate) else "-",
    ]


def _final_loss(run: ReportedRun) -> str:
    """Return the mean loss of the last hundredth of the run, of ten iterations at least."""
    loss = run.run.steps.loss
    last = loss[-max(10, len(loss) // 100) :]
    return f"{last.mean():.4f}" if np.isfinite(last).all() else "not finite"


def _largest(run: ReportedRun) -> str:
    layers = run.run.layers
    values = layers.values.get(STREAM_MAX_ABS.name)
    if values is None or not np.isfinite(values).any():
        return "-"
    values = np.where(np.isfinite(values) & (layers.layers <= run.num_layers), values, -np.inf)
    row, column = np.unravel_index(np.argmax(values), values.shape)
    where = layers.layers[column]
    layer = "embedding" if where == 0 else f"layer {where}"
    return f"{_short(float(values[row, column]))} ({layer}, iteration {layers.iteration[row]:,})"


def _variance(run: ReportedRun) -> str:
    layers = run.run.layers
    values = layers.values.get(STREAM_VARIANCE.name)
    if values is None:
        return "-"
    column = np.flatnonzero(layers.layers <= run.num_layers)[-1:]
    finite = np.flatnonzero(np.isfinite(values[:, column]).all(axis=1))
    if not len(column) or not len(finite):
        return "-"
    first, last = values[finite[0], column[0]], values[finite[-1], column[0]]
    return f"{_short(float(first))} → {_short(float(last))}"


def flag_table(runs: Sequence[ReportedRun]) -> Table | None:
    """Return a row for each flag that differs, or None with fewer than two runs or no such flag."""
    flags: list[dict[str, Any]] = [run.run.header.get("flags") or {} for run in runs]
    names = sorted({name for each in flags for name in each} - _NOT_TOLD)
    rows = []
    for name in names:
        values = [_value(each[name]) if name in each else "not set" for each in flags]
        if len(set(values)) > 1:
            rows.append([name.replace("_", "-"), *values])
    return Table(head=["Flag", *(run.name for run in runs)], rows=rows) if rows else None


def _value(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 1]}…"


def alert_table(runs: Sequence[ReportedRun]) -> Table | None:
    """Return a row for each run and kind of alert: how many, and the first."""
    rows = []
    for run in runs:
        by_kind: dict[str, list[dict[str, Any]]] = {}
        for alert in run.run.alerts:
            by_kind.setdefault(str(alert["alert"]), []).append(alert)
        rows += [
            [run.name, kind, f"{len(alerts):,}", f"{alerts[0]['iteration']:,}", str(alerts[0]["message"])]
            for kind, alerts in by_kind.items()
        ]
    head = ["Run", "Alert", "Times", "First at iteration", "The first one"]
    return Table(head=head, rows=rows) if rows else None


def remarks(runs: Sequence[ReportedRun]) -> list[str]:
    """Return what a reader should know of the files, run by run."""
    told = []
    for run in runs:
        iterations = run.run.steps.iteration
        missing = int(iterations[-1] - iterations[0] + 1 - len(iterations))
        if missing:
            told.append(f"{run.name}: {missing:,} iterations between the first and the last are missing.")
        if not len(run.run.layers.iteration):
            told.append(f"{run.name}: its file has no statistics of layers, so no figure by depth shows it.")
        if resumed := sorted(set(run.run.resumed_from)):
            last = f"{resumed[-1]:,}"
            told.append(f"{run.name}: resumed {len(resumed)} times, the last time at iteration {last}.")
    if len({run.num_layers for run in runs}) > 1:
        told.append("The runs differ in depth: the figures by depth have the layer's number on their axis.")
    return told


def _short(number: float) -> str:
    """Return a number with three digits and a unit."""
    if not math.isfinite(number):
        return str(number)
    for factor, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= factor:
            return f"{number / factor:.3g}{unit}"
    return f"{number:.3g}"
