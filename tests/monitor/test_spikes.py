"""Precision and recall of the spike detector on series whose spikes are known, beside a naive one."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view

from megatron_periln.monitor.spikes import GRADIENT_SPIKES, LOSS_SPIKES, SpikeDetector, SpikeRule
from tests.monitor.series import NOISES, Series, falling_loss, gradient_norm, score, with_spikes

SEEDS = range(3)
STEPS = 4000
CASES = [(kind, noise) for kind in ("loss", "gradient") for noise in NOISES]
LEAST_PRECISION = {"student-t, 3 degrees": 0.75, "contaminated": 0.9}
LEAST_RECALL = 0.9
RULES = {"loss": LOSS_SPIKES, "gradient": GRADIENT_SPIKES}


def series(kind: str, noise: str, seed: int) -> Series:
    if kind == "loss":
        return with_spikes(falling_loss(STEPS), NOISES[noise], sigma=0.006, heights=(1.08, 1.8), seed=seed)
    return with_spikes(gradient_norm(STEPS), NOISES[noise], sigma=0.15, heights=(4, 20), seed=seed)


def detect(rule: SpikeRule, values: np.ndarray) -> list[int]:
    detector = SpikeDetector(rule)
    return [step for step, value in enumerate(values.tolist()) if detector.step(value)]


def naive(values: np.ndarray, window: int = 100, sigmas: float = 6, rest: int = 20) -> list[int]:
    """Mean and standard deviation of a rolling window; silent for some steps after an alarm."""
    starting = [values[:step] for step in range(50, window)]
    later = sliding_window_view(values, window)[:-1]
    means = np.append([recent.mean() for recent in starting], later.mean(1))
    deviations = np.append([recent.std() for recent in starting], later.std(1))
    found: list[int] = []
    for step in (50 + np.flatnonzero(values[50:] > means + sigmas * deviations)).tolist():
        if not (found and step - found[-1] <= rest):
            found.append(step)
    return found


def rates(detector, kind: str, noise: str) -> tuple[float, float, int]:
    """Return precision, recall and the number of spikes, over all seeds."""
    hits = false = misses = 0
    for seed in SEEDS:
        made = series(kind, noise, seed)
        scored = score(detector(made.values), made.spikes)
        hits, false, misses = hits + scored[0], false + scored[1], misses + scored[2]
    return hits / max(hits + false, 1), hits / (hits + misses), hits + misses


def good_enough(detector, kind: str, noise: str) -> bool:
    precision, recall, _ = rates(detector, kind, noise)
    return recall >= LEAST_RECALL and precision >= LEAST_PRECISION.get(noise, 0.95)


@pytest.mark.parametrize(("kind", "noise"), CASES)
def test_precision_and_recall(kind, noise):
    assert good_enough(lambda values: detect(RULES[kind], values), kind, noise)


@pytest.mark.parametrize("sigmas", [3, 6])
def test_a_naive_detector_is_not_good_enough(sigmas):
    good = [good_enough(lambda values: naive(values, sigmas=sigmas), kind, noise) for kind, noise in CASES]
    assert sum(good) <= 10


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize(
    ("kind", "trend", "sigma"), [("loss", falling_loss, 0.006), ("gradient", gradient_norm, 0.15)]
)
def test_few_alarms_where_nothing_spikes(kind, noise, trend, sigma):
    values = trend(10_000) * np.exp(sigma * NOISES[noise](np.random.default_rng(7), 10_000))
    found = detect(RULES[kind], values)
    assert len(found) <= (20 if noise == "student-t, 3 degrees" else 3)


def test_a_rising_warm_up_is_no_spike():
    steps = np.arange(2000)
    for scale in (20, 100, 500):
        values = (0.1 + 3 * (1 - np.exp(-steps / scale))) * np.exp(
            0.1 * np.random.default_rng(0).standard_normal(2000)
        )
        assert detect(GRADIENT_SPIKES, values) == []


def test_noiseless_series():
    assert detect(LOSS_SPIKES, np.full(500, 2.5)) == []
    assert detect(LOSS_SPIKES, falling_loss(2000)) == []
    values = np.full(500, 2.5)
    values[300] = 2.8
    assert detect(LOSS_SPIKES, values) == [300]


@pytest.mark.parametrize("length", [1, 5, 60])
def test_one_alarm_a_spike(length):
    values = 3 * np.exp(0.005 * np.random.default_rng(1).standard_normal(600))
    values[300 : 300 + length] *= 1.5
    assert detect(LOSS_SPIKES, values) == [300]


def test_a_new_level_is_accepted_in_the_end():
    values = 3 * np.exp(0.005 * np.random.default_rng(2).standard_normal(1500))
    values[400:] *= 2
    values[1000:] *= 1.5
    assert detect(LOSS_SPIKES, values) == [400, 1000]


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf, 0.0, -1.0])
def test_odd_values_do_no_harm(odd):
    values = 3 * np.exp(0.005 * np.random.default_rng(3).standard_normal(600))
    values[[10, 200, 201, 202]] = odd
    values[400] = 6
    assert detect(LOSS_SPIKES, values) == [400]


def test_nothing_during_the_warm_up():
    values = np.full(LOSS_SPIKES.warmup, 1.0)
    values[10] = 100
    assert detect(LOSS_SPIKES, values) == []
