"""Synthetic losses and gradient norms with spikes whose steps are known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Noise = Callable[[np.random.Generator, int], Floats]


def _autocorrelated(rng: np.random.Generator, steps: int) -> Floats:
    noise = rng.standard_normal(steps)
    for step in range(1, steps):
        noise[step] += 0.5 * noise[step - 1]
    return noise


def _growing(rng: np.random.Generator, steps: int) -> Floats:
    return rng.standard_normal(steps) * np.linspace(1, 2, steps)


NOISES: dict[str, Noise] = {
    "normal": lambda rng, steps: rng.standard_normal(steps),
    "student-t, 5 degrees": lambda rng, steps: rng.standard_t(5, steps),
    "student-t, 3 degrees": lambda rng, steps: rng.standard_t(3, steps),
    "laplace": lambda rng, steps: rng.laplace(size=steps),
    "contaminated": lambda rng, steps: rng.standard_normal(steps) * np.where(rng.random(steps) < 0.05, 4, 1),
    "autocorrelated": _autocorrelated,
    "growing": _growing,
}


def falling_loss(steps: int) -> Floats:
    """From ln(50,000) down, as a power law, with a learning rate that decays at the end."""
    step = np.arange(steps)
    loss = 2.5 + 8.3 * (1 + step / 40) ** -0.6
    return loss - 0.15 * np.clip((step - 0.8 * steps) / (0.2 * steps), 0, 1)


def gradient_norm(steps: int) -> Floats:
    """Rising through the learning rate's warm-up, then falling to a level."""
    step = np.arange(steps)
    return 0.3 + 2.5 * np.minimum(step / 200, 1) * np.exp(-np.maximum(step - 200, 0) / 400)


@dataclass(frozen=True)
class Series:
    values: Floats
    spikes: list[int]


def with_spikes(
    trend: Floats, noise: Noise, *, sigma: float, heights: tuple[float, float], seed: int, every: int = 400
) -> Series:
    """Multiply ``trend`` by noise of ``sigma``, and by spikes that decay, about one in ``every`` steps.

    A spike rises by a factor uniform in the logarithm between ``heights`` and falls back with a time
    constant of 2 to 20 steps.
    """
    rng = np.random.default_rng(seed)
    level = np.log(trend) + sigma * noise(rng, len(trend))
    spikes = []
    position = 150 + int(rng.integers(every))
    while position < len(trend) - 60:
        spikes.append(position)
        tail = np.arange(min(200, len(trend) - position))
        height = rng.uniform(*np.log(heights))
        level[position : position + len(tail)] += height * np.exp(-tail / rng.uniform(2, 20))
        position += 150 + int(rng.integers(2 * (every - 150)))
    return Series(np.exp(level), spikes)


def score(found: list[int], spikes: list[int], *, late: int = 5) -> tuple[int, int, int]:
    """Return hits, false alarms and misses; a hit is an alarm at most ``late`` steps after its spike.

    A second alarm for one spike is a false alarm.
    """
    left, false = list(spikes), 0
    for step in found:
        matches = [spike for spike in left if 0 <= step - spike <= late]
        if matches:
            left.remove(matches[0])
        else:
            false += 1
    return len(spikes) - len(left), false, len(left)
