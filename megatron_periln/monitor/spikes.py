"""Spikes of a noisy series with a trend: a robust z-score on a rolling window."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["GRADIENT_SPIKES", "LOSS_SPIKES", "Spike", "SpikeDetector", "SpikeRule"]

_MAD_TO_SIGMA = 1.4826  # of a normal distribution
_TINY = 1e-30


@dataclass(frozen=True, kw_only=True)
class SpikeRule:
    """When a value is a spike.

    Values are compared by their logarithm: a spike is a rise by a factor. With ``z`` a value's distance
    above the forecast in robust standard deviations, a spike is a ``z`` above ``confirmed`` twice within
    three steps, or above ``alone`` once.

    Parameters
    ----------
    window
        Steps that the forecast and the noise come from.
    warmup
        Steps of them needed before anything is a spike.
    confirmed, alone
        The thresholds of ``z``.
    least_noise
        The smallest standard deviation of the logarithm that is believed, so that a series with almost
        no noise needs a rise worth the name: by a factor of at least ``exp(confirmed * least_noise)``.
    calm
        Steps below ``confirmed / 2`` that end a spike.
    """

    window: int = 128
    warmup: int = 48
    confirmed: float = 6.0
    alone: float = 16.0
    least_noise: float = 0.003
    calm: int = 8


LOSS_SPIKES = SpikeRule()
GRADIENT_SPIKES = SpikeRule(confirmed=5.0, alone=12.0, least_noise=0.05)


@dataclass(frozen=True)
class Spike:
    """A value, the forecast that it exceeds, and by how many robust standard deviations."""

    value: float
    forecast: float
    z: float


class SpikeDetector:
    """Finds spikes as values come, each once."""

    def __init__(self, rule: SpikeRule) -> None:
        self.rule = rule
        self._window: deque[float] = deque(maxlen=rule.window)
        self._suspects: deque[bool] = deque(maxlen=2)
        self._calm = 0  # steps to go before the present spike has ended
        self._elapsed = 0

    def step(self, value: float) -> Spike | None:
        """Take the next value; return a spike where one begins. What is not finite is skipped."""
        if not math.isfinite(value):
            return None
        level = math.log(max(value, _TINY))
        if len(self._window) < self.rule.warmup:
            self._window.append(level)
            return None
        forecast, noise = self._forecast()
        z = (level - forecast) / noise
        if self._calm:
            self._during_spike(level, z)
            return None
        suspect = z > self.rule.confirmed
        if z > self.rule.alone or (suspect and any(self._suspects)):
            self._suspects.clear()
            self._calm, self._elapsed = self.rule.calm, 0
            return Spike(value, math.exp(forecast), z)
        self._suspects.append(suspect)
        self._window.append(min(level, forecast + self.rule.confirmed * noise))
        return None

    def _during_spike(self, level: float, z: float) -> None:
        self._elapsed += 1
        if z < self.rule.confirmed / 2:
            self._calm -= 1
            self._window.append(level)
        else:
            self._calm = self.rule.calm
        if self._elapsed > self.rule.window:  # no spike but a new level
            self._calm = 0
            self._window.clear()

    def _forecast(self) -> tuple[float, float]:
        """Return the level expected next and the noise around the window's trend."""
        values = np.fromiter(self._window, dtype=np.float64, count=len(self._window))
        half = len(values) // 2
        early, late = _median(values[:half]), _median(values[half:])
        slope = (late - early) / (len(values) - half)
        trend = late + slope * _distances(len(values))
        noise = _MAD_TO_SIGMA * _median(np.abs(values - trend))
        ahead = late + slope * (len(values) - half) / 2
        recent = _median(values[-max(len(values) // 8, 5) :])  # a falling series that levels off
        return max(ahead, recent), max(noise, self.rule.least_noise)


def _median(values: NDArray[np.float64]) -> float:
    """Return what ``np.median`` returns of finite values, in a fraction of its time for so few."""
    ordered = np.sort(values)
    middle = len(values) // 2
    if len(values) % 2:
        return float(ordered[middle])
    return float(ordered[middle - 1] + ordered[middle]) / 2


@cache
def _distances(length: int) -> NDArray[np.float64]:
    """Return how far each step of a window is from the middle of its later half."""
    half = length // 2
    return np.arange(length, dtype=np.float64) - half - (length - half - 1) / 2
