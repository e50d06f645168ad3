"""A monitor's file as arrays."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_periln.monitor.lines import STEP, RecordError, from_json, read_lines
from megatron_periln.monitor.statistics import STATISTICS

__all__ = ["LayerStatistics", "Run", "StepSeries", "read_run"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class StepSeries:
    """What every iteration has; all arrays of shape ``[iterations]``, NaN where the file has null."""

    iteration: Integers
    loss: Floats
    grad_norm: Floats
    learning_rate: Floats
    tokens: Floats
    seconds: Floats


@dataclass(frozen=True, kw_only=True)
class LayerStatistics:
    """What the intervals have.

    Parameters
    ----------
    iteration
        Of each interval, ``[intervals]``.
    layers
        Layer numbers, ``[layers]``: 0 the embedding, 1 to L the layers, L + 1 the final norm.
    values
        For each statistic of the file an array ``[intervals, layers]``, NaN where the file has null.
    """

    iteration: Integers
    layers: Integers
    values: dict[str, Floats]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a monitor's file holds.

    Parameters
    ----------
    path
        The file.
    header
        The fields of the last process: the run's own, or those of its last resume.
    resumed_from
        Iterations of the checkpoints that the run resumed from.
    steps, layers
        Its numbers.
    alerts
        The entries of kind ``alert``, ``value`` as a number or None.
    """

    path: Path
    header: dict[str, Any]
    resumed_from: list[int]
    steps: StepSeries
    layers: LayerStatistics
    alerts: list[dict[str, Any]]


def read_run(path: Path) -> Run:
    """Read a monitor's file; a last line that a kill has torn is skipped.

    Raises
    ------
    RecordError
        If it cannot be read, is corrupt, or is no monitor's file.
    """
    runs: list[dict[str, Any]] = []
    steps: dict[int, dict[str, Any]] = {}
    layers: dict[int, dict[str, Any]] = {}
    alerts: list[dict[str, Any]] = []
    lines = 0
    try:
        for _, entry in read_lines(path):
            lines += 1
            kind, iteration = entry["kind"], entry["iteration"]
            if kind == "run":
                runs.append(entry)
            elif kind == "step":
                steps[iteration] = {key: from_json(entry.get(key)) for key in STEP}
            elif kind == "layers":
                layers[iteration] = _layers(entry)
            else:
                value = entry.get("value")
                alerts.append({**entry, "value": None if value is None else from_json(value)})
    except (KeyError, TypeError, ValueError) as error:
        raise RecordError(f"{path}, line {lines}: not as in the schema ({error})") from error
    if not runs:
        raise RecordError(f"{path}: holds no run")
    return Run(
        path=path,
        header=runs[-1],
        resumed_from=[run["iteration"] for run in runs if run["iteration"] > 0],
        steps=_step_series(steps),
        layers=_layer_statistics(layers),
        alerts=alerts,
    )


def _layers(entry: dict[str, Any]) -> dict[str, Any]:
    layers = [int(layer) for layer in entry["layers"]]
    values = {}
    for name in entry.keys() & STATISTICS.keys():
        values[name] = [from_json(value) for value in entry[name]]
        if len(values[name]) != len(layers):
            raise ValueError(f"{name} has {len(values[name])} values for {len(layers)} layers")
    return {"layers": layers, "values": values}


def _step_series(steps: dict[int, dict[str, Any]]) -> StepSeries:
    order = sorted(steps)
    columns: dict[str, Floats] = {
        key: np.array([steps[iteration][key] for iteration in order], dtype=np.float64) for key in STEP
    }
    return StepSeries(iteration=np.array(order, dtype=np.int64), **columns)


def _layer_statistics(intervals: dict[int, dict[str, Any]]) -> LayerStatistics:
    order = sorted(intervals)
    layers = _union(entry["layers"] for entry in intervals.values())
    column = {layer: index for index, layer in enumerate(layers)}
    names = [name for name in STATISTICS if any(name in entry["values"] for entry in intervals.values())]
    values = {name: np.full((len(order), len(layers)), np.nan) for name in names}
    for row, iteration in enumerate(order):
        entry = intervals[iteration]
        columns = [column[layer] for layer in entry["layers"]]
        for name, numbers in entry["values"].items():
            values[name][row, columns] = numbers
    return LayerStatistics(
        iteration=np.array(order, dtype=np.int64), layers=np.array(layers, dtype=np.int64), values=values
    )


def _union(lists: Iterable[list[int]]) -> list[int]:
    return sorted({layer for layers in lists for layer in layers})
