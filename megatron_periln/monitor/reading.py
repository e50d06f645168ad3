"""A monitor's file as arrays."""

from __future__ import annotations

import math
from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_periln.monitor.lines import STEP, RecordError, from_json, read_blocks
from megatron_periln.monitor.statistics import STATISTICS

__all__ = ["LayerStatistics", "Run", "StepSeries", "read_run"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
_WRONG = (KeyError, TypeError, ValueError, OverflowError)


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


def read_run(path: Path, *, without: Collection[str] = ()) -> Run:
    """Read a monitor's file; a last line that a kill has torn is skipped.

    Parameters
    ----------
    path
        The file.
    without
        Of a step, what is not wanted: NaN in what is returned, which then takes no memory.

    Raises
    ------
    RecordError
        If it cannot be read, is corrupt, or is no monitor's file.
    """
    runs: list[dict[str, Any]] = []
    steps = _Steps([name for name in STEP if name not in without])
    layers = _Layers()
    alerts: list[dict[str, Any]] = []
    number = 0
    for lines, entries in read_blocks(path):
        try:
            steps.add([entry for entry in entries if entry["kind"] == "step"])
            for entry in entries:
                if entry["kind"] != "step":
                    _add_other(entry, runs, layers, alerts)
        except _WRONG as error:
            raise RecordError(f"{path}, {_first_wrong(entries, number, error)}") from error
        number += len(lines)
    if not runs:
        raise RecordError(f"{path}: holds no run")
    return Run(
        path=path,
        header=runs[-1],
        resumed_from=[run["iteration"] for run in runs if run["iteration"] > 0],
        steps=steps.series(),
        layers=layers.statistics(),
        alerts=alerts,
    )


def _add_other(
    entry: dict[str, Any], runs: list[dict[str, Any]], layers: _Layers, alerts: list[dict[str, Any]]
) -> None:
    if entry["kind"] == "layers":
        layers.add(entry)
    elif entry["kind"] == "run":
        runs.append(entry)
    else:
        value = entry.get("value")
        alerts.append({**entry, "value": None if value is None else from_json(value)})


def _first_wrong(entries: list[dict[str, Any]], before: int, error: Exception) -> str:
    """Return which line is wrong, and how."""
    for number, entry in enumerate(entries, before + 1):
        try:
            if entry["kind"] == "step":
                _Steps(STEP).add([entry])
            else:
                _add_other(entry, [], _Layers(), [])
        except _WRONG as wrong:
            return f"line {number}: not as in the schema ({wrong})"
    return f"lines {before + 1} to {before + len(entries)}: not as in the schema ({error})"


class _Steps:
    """Lines of kind ``step``: eight bytes a number, where an object a line takes a hundred times as much."""

    def __init__(self, names: Sequence[str]) -> None:
        self._iterations = array("q")
        self._columns = [(name, array("d")) for name in names]

    def add(self, entries: Sequence[dict[str, Any]]) -> None:
        self._iterations.extend([entry["iteration"] for entry in entries])
        for name, column in self._columns:
            values: list[Any] = [entry.get(name) for entry in entries]
            try:
                column.extend(array("d", values))
            except TypeError:  # null, or a NaN's name
                column.extend([from_json(value) for value in values])

    def series(self) -> StepSeries:
        iterations = np.frombuffer(self._iterations, np.int64)
        order = _last_of_each(iterations)
        columns = {name: _compact(np.frombuffer(column)[order]) for name, column in self._columns}
        absent = {name: _all_the_same(math.nan, len(iterations[order])) for name in STEP}
        return StepSeries(iteration=iterations[order], **{**absent, **columns})


class _Layers:
    """Lines of kind ``layers``, in runs of those that have the same layers and statistics."""

    def __init__(self) -> None:
        self._iterations = array("q")
        self._alike: list[tuple[list[int], dict[str, array[float]], int]] = []
        """The layers, the values and the first line of each run of them."""

    def add(self, entry: dict[str, Any]) -> None:
        layers = [int(layer) for layer in entry["layers"]]
        values = {
            name: [from_json(value) for value in entry[name]] for name in entry.keys() & STATISTICS.keys()
        }
        for name, numbers in values.items():
            if len(numbers) != len(layers):
                raise ValueError(f"{name} has {len(numbers)} values for {len(layers)} layers")
        if not self._alike or self._alike[-1][0] != layers or self._alike[-1][1].keys() != values.keys():
            self._alike.append((layers, {name: array("d") for name in values}, len(self._iterations)))
        for name, numbers in values.items():
            self._alike[-1][1][name].extend(numbers)
        self._iterations.append(entry["iteration"])

    def statistics(self) -> LayerStatistics:
        iterations = np.frombuffer(self._iterations, np.int64)
        layers = np.array(sorted({layer for some, _, _ in self._alike for layer in some}), dtype=np.int64)
        order = _last_of_each(iterations)
        values = {}
        for name in STATISTICS:
            if any(name in some for _, some, _ in self._alike):
                values[name] = self._joined(name, layers, len(iterations))[order]
        return LayerStatistics(iteration=iterations[order], layers=layers, values=values)

    def _joined(self, name: str, layers: Integers, lines: int) -> Floats:
        joined = np.full((lines, len(layers)), np.nan)
        for of_some, values, first in self._alike:
            if name in values and of_some:
                rows = np.frombuffer(values.pop(name)).reshape(-1, len(of_some))
                joined[first : first + len(rows), np.searchsorted(layers, of_some)] = rows
        return joined


def _last_of_each(iterations: Integers) -> slice | Integers:
    """Return the indices of the last line of each iteration, by iteration."""
    if (np.diff(iterations) > 0).all():
        return slice(None)
    order = np.argsort(iterations, kind="stable")
    return order[np.append(np.diff(iterations[order]) > 0, True)[: len(order)]]


def _compact(values: Floats) -> Floats:
    """Return the same, without memory where all are the same, as the tokens of a step mostly are."""
    return _all_the_same(values[0], len(values)) if len(values) and (values == values[0]).all() else values


def _all_the_same(value: float, number: int) -> Floats:
    return np.broadcast_to(np.float64(value), number)
