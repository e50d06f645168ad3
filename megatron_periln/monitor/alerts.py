"""What a run should tell of itself while it trains."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_periln.monitor.lines import read_lines
from megatron_periln.monitor.schema import STATISTICS
from megatron_periln.monitor.spikes import GRADIENT_SPIKES, LOSS_SPIKES, SpikeDetector, SpikeRule
from megatron_periln.monitor.thresholds import GAIN_LIMITS, RANGES, STOPS, GainLimits, Range

__all__ = ["STOPS", "Alert", "Watch"]

_REPLAYED_WINDOWS = 16


@dataclass(frozen=True)
class Alert:
    """Something that a user should know; ``kind`` is one of `megatron_periln.monitor.schema.ALERTS`."""

    iteration: int
    kind: str
    message: str
    layer: int | None = None
    value: float | None = None


_BACKWARD = ("stream_gradient_norm", "attention_gradient_norm", "mlp_gradient_norm", "norm_gradient_norm")
_FORWARD_ORDER = tuple(
    f"{sublayer}_{suffix}"
    for sublayer in ("attention", "mlp")
    for suffix in (
        "mean_square", "variance", "gain_mean", "gain_min", "gain_max",
        "output_mean_square", "output_variance", "ratio",
    )
)  # fmt: skip
_FORWARD = _FORWARD_ORDER + tuple(
    name for name in STATISTICS if name not in _FORWARD_ORDER and name not in _BACKWARD
)


class Watch:
    """Raises alerts from what the monitor measures, each once.

    Parameters
    ----------
    initial_gain
        Of the output norms: 1, or ``1/sqrt(num_layers)``.
    skips_overflow
        Whether a step whose gradient norm is not finite is skipped and tried with a smaller loss scale,
        as FP16's dynamic scaler does: then that is no alert.
    loss, gradient
        The rules for spikes.
    ranges, gains
        The thresholds for layers.
    """

    def __init__(
        self,
        *,
        initial_gain: float = 1.0,
        skips_overflow: bool = False,
        loss: SpikeRule = LOSS_SPIKES,
        gradient: SpikeRule = GRADIENT_SPIKES,
        ranges: Sequence[Range] = RANGES,
        gains: GainLimits = GAIN_LIMITS,
    ) -> None:
        self._detectors = {"loss": SpikeDetector(loss), "gradient": SpikeDetector(gradient)}
        self._skips_overflow = skips_overflow
        self._ranges = ranges
        self._dead = gains.dead * initial_gain
        self._exploding = gains.exploding * initial_gain
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

    def layers(
        self, iteration: int, layers: Sequence[int], statistics: Mapping[str, Sequence[float | None]]
    ) -> list[Alert]:
        """Return the alerts that an interval's statistics raise."""
        return [
            *self._first_not_finite(iteration, layers, statistics),
            *self._beyond_ranges(iteration, layers, statistics),
            *self._gains(iteration, layers, statistics),
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

    def _first_not_finite(
        self, iteration: int, layers: Sequence[int], statistics: Mapping[str, Sequence[float | None]]
    ) -> list[Alert]:
        """Return an alert for the first layer, in the order of computation, with NaN or Inf."""
        found = _first(layers, statistics, _FORWARD, reverse=False)
        found = found or _first(layers, statistics, _BACKWARD, reverse=True)
        again, self._not_finite["layers"] = self._not_finite["layers"], found is not None
        if found is None or again:
            return []
        layer, name, value = found
        if name in _BACKWARD and self._skips_overflow:
            return []
        way = "backward" if name in _BACKWARD else "forward"
        message = (
            f"{name} of layer {layer} is {value}: of the layers watched, the first one in the {way} pass"
        )
        return [Alert(iteration, "nan", message, layer, value)]

    def _beyond_ranges(
        self, iteration: int, layers: Sequence[int], statistics: Mapping[str, Sequence[float | None]]
    ) -> list[Alert]:
        maxima = [
            (value, layer)
            for layer, value in zip(layers, statistics.get("stream_max_abs", ()), strict=False)
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

    def _gains(
        self, iteration: int, layers: Sequence[int], statistics: Mapping[str, Sequence[float | None]]
    ) -> list[Alert]:
        alerts = []
        for index, sublayer in enumerate(("attention", "mlp")):
            lists = [statistics.get(f"{sublayer}_gain_{part}", ()) for part in ("min", "max")]
            for layer, low, high in zip(layers, *lists, strict=False):
                if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
                    continue
                largest = max(abs(low), abs(high))
                if largest < self._dead and self._first_time("dead-gain", index, layer):
                    message = f"the output gains of {sublayer} in layer {layer} are all within ±{largest:.2g}"
                    alerts.append(Alert(iteration, "dead-gain", message, layer, largest))
                if largest > self._exploding and self._first_time("exploding-gain", index, layer):
                    message = f"an output gain of {sublayer} in layer {layer} is {largest:.4g}"
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
    statistics: Mapping[str, Sequence[float | None]],
    names: Sequence[str],
    *,
    reverse: bool,
) -> tuple[int, str, float] | None:
    for index in sorted(range(len(layers)), key=layers.__getitem__, reverse=reverse):
        for name in names:
            if name in statistics:
                value = statistics[name][index]
                if value is not None and not math.isfinite(value):
                    return layers[index], name, value
    return None
