"""What a run should tell of itself while it trains: alerts, their thresholds, and the watch."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_periln.monitor.lines import read_lines
from megatron_periln.monitor.spikes import GRADIENT_SPIKES, LOSS_SPIKES, SpikeDetector, SpikeRule
from megatron_periln.monitor.statistics import (
    BACKWARD,
    FORWARD,
    STATISTICS,
    STREAM_MAX_ABS,
    SUBLAYERS,
    Statistic,
)

__all__ = ["ALERTS", "RANGES", "STOPS", "WEIGHT_LIMITS", "Alert", "Range", "Watch", "WeightLimits"]

ALERTS: dict[str, str] = {
    "loss-spike": "the loss jumps above its recent level",
    "gradient-spike": "the global gradient norm jumps above its recent level",
    "nan": "NaN or Inf in the loss, the gradient norm or a layer's statistic",
    "fp16-range": "max |x| of the residual stream nears or passes FP16's largest number, 65,504",
    "fp8-range": "max |x| of the residual stream passes FP8 E4M3's largest number, 448: for information",
    "dead-gain": "every weight of an output norm is almost 0: the sublayer adds nothing",
    "exploding-gain": "a weight of an output norm is very large",
    "record": "lines that could not be written to this file",
}

STOPS: dict[str, frozenset[str]] = {
    "nan": frozenset({"nan"}),
    "spike": frozenset({"loss-spike", "gradient-spike"}),
}

_REPLAYED_WINDOWS = 16


@dataclass(frozen=True)
class Alert:
    """Something that a user should know; ``kind`` is one of `ALERTS`."""

    iteration: int
    kind: str
    message: str
    layer: int | None = None
    value: float | None = None


@dataclass(frozen=True, kw_only=True)
class Range:
    """A level of max |x| of the residual stream worth an alert, the first time that it is reached."""

    kind: str
    level: float
    meaning: str


RANGES: tuple[Range, ...] = (
    Range(
        kind="fp8-range",
        level=448.0,
        meaning="above 448, FP8 E4M3's largest number: only information, FP8 training scales tensors before "
        "the cast, but the larger the maximum, the fewer bits are left for the rest",
    ),
    Range(kind="fp16-range", level=65504.0 / 2, meaning="above half of FP16's largest number, 65,504"),
    Range(
        kind="fp16-range",
        level=65504.0,
        meaning="above FP16's largest number, 65,504: FP16 would overflow, BF16 and FP32 do not",
    ),
)


@dataclass(frozen=True, kw_only=True)
class WeightLimits:
    """Weights of output norms that are dead or exploding, as multiples of their initial value."""

    dead: float = 0.01
    exploding: float = 100.0


WEIGHT_LIMITS = WeightLimits()

Values = Mapping[str, Sequence[float | None]]
"""A list parallel to the layers for each statistic, by name; None where it does not apply."""


class Watch:
    """Raises alerts from what the monitor measures, each once.

    Parameters
    ----------
    initial_weight
        Of the output norms: 1, or ``1/sqrt(num_layers)``.
    skips_overflow
        Whether a step whose gradient norm is not finite is skipped and tried with a smaller loss scale,
        as FP16's dynamic scaler does: then that is no alert.
    loss, gradient
        The rules for spikes.
    ranges, weights
        The thresholds for layers.
    """

    def __init__(
        self,
        *,
        initial_weight: float = 1.0,
        skips_overflow: bool = False,
        loss: SpikeRule = LOSS_SPIKES,
        gradient: SpikeRule = GRADIENT_SPIKES,
        ranges: Sequence[Range] = RANGES,
        weights: WeightLimits = WEIGHT_LIMITS,
    ) -> None:
        self._detectors = {"loss": SpikeDetector(loss), "gradient": SpikeDetector(gradient)}
        self._skips_overflow = skips_overflow
        self._ranges = ranges
        self._dead = weights.dead * initial_weight
        self._exploding = weights.exploding * initial_weight
        self._not_finite = {"loss": False, "gradient": False, "layers": False}
        self._raised: set[tuple[str, float, int]] = set()

    def step(self, iteration: int, loss: float | None, grad_norm: float | None) -> list[Alert]:
        """Return the alerts that an iteration's loss and global gradient norm raise."""
        alerts = []
        for what, text, value in (("loss", "loss", loss), ("gradient", "gradient norm", grad_norm)):
            if value is None:
                continue
            finite = math.isfinite(value)
            if (
                not finite
                and not self._not_finite[what]
                and not (what == "gradient" and self._skips_overflow)
            ):
                alerts.append(Alert(iteration, "nan", f"{text} is {value}", value=value))
            self._not_finite[what] = not finite
            if spike := self._detectors[what].step(value):
                due, z = f"{spike.forecast:.4g}", f"{spike.z:.0f}"
                message = f"{text} {value:.4g} where about {due} was due: {z} robust sigmas above"
                alerts.append(Alert(iteration, f"{what}-spike", message, value=value))
        return alerts

    def layers(self, iteration: int, layers: Sequence[int], statistics: Values) -> list[Alert]:
        """Return the alerts that an interval's statistics raise."""
        return [
            *self._first_not_finite(iteration, layers, statistics),
            *self._beyond_ranges(iteration, layers, statistics),
            *self._weights(iteration, layers, statistics),
        ]

    def replay(self, path: Path) -> None:
        """Take the state after all that a monitor's file holds: what was raised is raised no more.

        Spikes depend on the recent past only: of a long run the last part of the steps is replayed.

        Raises
        ------
        RecordError
            If the file cannot be read.
        """
        window = max(detector.rule.window for detector in self._detectors.values())
        steps: deque[dict[str, Any]] = deque(maxlen=_REPLAYED_WINDOWS * window)
        for _, entry in read_lines(path):
            if entry["kind"] == "step":
                steps.append(entry)
            elif entry["kind"] == "layers":
                statistics = {
                    name: [_number(value) for value in values]
                    for name, values in entry.items()
                    if name in STATISTICS
                }
                self.layers(entry["iteration"], entry["layers"], statistics)
        for entry in steps:
            self.step(entry["iteration"], _number(entry["loss"]), _number(entry["grad_norm"]))

    def _first_not_finite(self, iteration: int, layers: Sequence[int], statistics: Values) -> list[Alert]:
        """Return an alert for the first layer, in the order of computation, with NaN or Inf."""
        found = _first(layers, statistics, FORWARD, reverse=False)
        found = found or _first(layers, statistics, BACKWARD, reverse=True)
        again, self._not_finite["layers"] = self._not_finite["layers"], found is not None
        if found is None or again:
            return []
        layer, statistic, value = found
        if statistic in BACKWARD and self._skips_overflow:
            return []
        way = "backward" if statistic in BACKWARD else "forward"
        first = f"of the layers watched, the first one in the {way} pass"
        message = f"{statistic.name} of layer {layer} is {value}: {first}"
        return [Alert(iteration, "nan", message, layer, value)]

    def _beyond_ranges(self, iteration: int, layers: Sequence[int], statistics: Values) -> list[Alert]:
        maxima = [
            (value, layer)
            for layer, value in zip(layers, statistics.get(STREAM_MAX_ABS.name, ()), strict=False)
            if value is not None and math.isfinite(value)
        ]
        if not maxima:
            return []
        value, layer = max(maxima)
        return [
            Alert(
                iteration, each.kind, f"max |x| {value:,.0f} in layer {layer}: {each.meaning}", layer, value
            )
            for each in self._ranges
            if value > each.level and self._first_time(each.kind, each.level, -1)
        ]

    def _weights(self, iteration: int, layers: Sequence[int], statistics: Values) -> list[Alert]:
        alerts = []
        for index, (sublayer, of) in enumerate(SUBLAYERS.items()):
            lists = [statistics.get(extreme.name, ()) for extreme in (of.gain_min, of.gain_max)]
            for layer, low, high in zip(layers, *lists, strict=False):
                where = f"of {sublayer} in layer {layer}"
                if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
                    continue
                largest = max(abs(low), abs(high))
                if largest < self._dead and self._first_time("dead-gain", index, layer):
                    message = f"the output-norm weights {where} are all within ±{largest:.2g}"
                    alerts.append(Alert(iteration, "dead-gain", message, layer, largest))
                if largest > self._exploding and self._first_time("exploding-gain", index, layer):
                    message = f"an output-norm weight {where} is {largest:.4g}"
                    alerts.append(Alert(iteration, "exploding-gain", message, layer, largest))
        return alerts

    def _first_time(self, kind: str, what: float, layer: int) -> bool:
        seen = (kind, what, layer) in self._raised
        self._raised.add((kind, what, layer))
        return not seen


def _number(value: float | str | None) -> float | None:
    return None if value is None else float(value)


def _first(
    layers: Sequence[int],
    statistics: Values,
    order: Sequence[Statistic],
    *,
    reverse: bool,
) -> tuple[int, Statistic, float] | None:
    """Return the first value that is not finite: its layer, the statistic, and the value."""
    for index in sorted(range(len(layers)), key=layers.__getitem__, reverse=reverse):
        for statistic in order:
            if statistic.name in statistics:
                value = statistics[statistic.name][index]
                if value is not None and not math.isfinite(value):
                    return layers[index], statistic, value
    return None
