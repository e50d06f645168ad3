"""Plausible runs for tests and pictures: pre grows exponentially with depth, peri linearly, post not at all.

``python -m tests.report.synthetic FOLDER`` writes one run of each placement.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_periln.monitor.alerts import Watch
from megatron_periln.monitor.lines import FILE_NAME
from megatron_periln.monitor.record import RunRecord

__all__ = ["write_run"]

_FINAL_LOSS = {"pre": 3.05, "post": 3.16, "peri": 2.98, "output": 3.0}
_SPIKES = {"pre": 5, "post": 3, "peri": 0, "output": 0}


def write_run(
    folder: Path,
    placement: str = "peri",
    *,
    steps: int = 600,
    num_layers: int = 12,
    interval: int = 50,
    layers: bool = True,
    seed: int = 0,
    name: str | None = None,
    nan_from: int | None = None,
    **flags: object,
) -> Path:
    """Write a run's file into ``folder`` as training would, alerts included, and return the file."""
    rng = np.random.default_rng([seed, *placement.encode()])
    header = {
        "version": "0.1.0",
        "name": name or placement,
        "placement": placement,
        "num_layers": num_layers,
        "hidden_size": 256,
        "parameters": 12 * num_layers * 256**2 + (2 * num_layers * 256 if placement == "peri" else 0),
        "flags": {"norm_placement": placement, "lr": 1e-3, "seq_length": 1024, "save": str(folder)} | flags,
        "started": "2026-01-02T03:04:05+00:00",
    }
    record = RunRecord.open(folder / FILE_NAME, header, 0)
    watch = Watch()
    loss, grad_norm = _training(rng, placement, steps)
    seconds = 0.5 * np.exp(0.03 * rng.standard_normal(steps)) * (1.02 if placement == "peri" else 1)
    for step in range(1, steps + 1):
        broken = nan_from is not None and step >= nan_from
        values = (math.nan, math.nan) if broken else (loss[step - 1].item(), grad_norm[step - 1].item())
        rate = 1e-3 * min(step / (0.1 * steps), 1)
        record.step(
            step,
            loss=values[0],
            grad_norm=values[1],
            learning_rate=rate,
            tokens=65536,
            seconds=seconds[step - 1],
        )
        alerts = watch.step(step, *values)
        if layers and (step % interval == 0 or step in (1, steps)):
            numbers, statistics = _layers(rng, placement, num_layers, step / steps, broken)
            record.layers(step, numbers, statistics)
            alerts += watch.layers(step, numbers, statistics)
        for alert in alerts:
            record.alert(step, alert.kind, alert.message, alert.layer, alert.value)
    record.close()
    return record.path


def _training(
    rng: np.random.Generator, placement: str, steps: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    step = np.arange(steps)
    final = _FINAL_LOSS[placement]
    loss = final + (10.8 - final) * (1 + 40 * step / steps) ** -1.1
    grad_norm = 0.4 + 3 * np.exp(-12 * step / steps)
    loss *= np.exp(0.006 * rng.standard_normal(steps))
    grad_norm *= np.exp(0.12 * rng.standard_normal(steps))
    if steps > 200:
        for start in rng.integers(steps // 4, steps - 60, _SPIKES[placement]):
            decay = np.exp(-np.arange(steps - start) / 6)
            loss[start:] *= 1 + rng.uniform(0.1, 0.5) * decay
            grad_norm[start:] *= 1 + rng.uniform(5, 20) * decay
    return loss, grad_norm


def _layers(
    rng: np.random.Generator, placement: str, num_layers: int, progress: float, broken: bool
) -> tuple[list[int], dict[str, list[float | None]]]:
    depth = np.arange(num_layers + 1)
    match placement:
        case "pre":
            variance = 0.02 + 0.05 * depth * np.exp(progress * 7 * depth / num_layers)
            maximum = np.sqrt(variance) * np.where(depth > 2, 6 + 2000 * progress, 6)
        case "post":
            variance, maximum = np.full(num_layers + 1, 1.0), np.full(num_layers + 1, 6 + 4 * progress)
        case _:
            variance = 1 + (2 + 3 * progress) * depth
            maximum = np.sqrt(variance) * (5 + 10 * progress)
    noise = np.exp(0.05 * rng.standard_normal((6, num_layers + 1)))
    output = {"pre": 0.02 * 200**progress, "post": 0.3}.get(placement, 0.01 * 10**progress)
    added = output if placement in ("pre", "post") else 1.0 + progress
    gradient = {
        "post": 0.02 * 1.3**depth,
        "pre": 0.3 * np.exp(-2 * depth / num_layers),
    }.get(placement, np.full(num_layers + 1, 0.08))
    weight = 1 + progress * (0.2 + 0.05 * depth)
    output_norm = placement in ("peri", "output")
    stream = {
        "stream_mean_square": variance * 1.01,
        "stream_variance": variance * noise[0],
        "stream_max_abs": maximum * noise[1],
        "stream_fp16_half_fraction": np.where(maximum > 32752, 1e-6, 0.0),
        "angular_distance": (0.3 / (1 + 0.3 * depth) * (1.5 if output_norm else 1.0)) * noise[2],
        "stream_gradient_norm": gradient * 0.1 * noise[3],
    }
    sublayer: dict[str, NDArray[np.float64]] = {"norm_gradient_norm": gradient * 0.05 * noise[3]}
    for index, what in enumerate(("attention", "mlp")):
        spread = noise[4 + index]
        sublayer |= {
            f"{what}_mean_square": output * spread,
            f"{what}_variance": output * spread,
            f"{what}_output_mean_square": added * spread,
            f"{what}_output_variance": added * spread,
            f"{what}_ratio": np.sqrt(added / variance) * spread,
            f"{what}_gradient_norm": gradient * spread,
        }
        if output_norm:
            sublayer |= {f"{what}_gain_{part}": weight * factor * (1 + 0.1 * index)
                         for part, factor in (("mean", 1.0), ("min", 0.6), ("max", 1.5))}  # fmt: skip
    final = dict.fromkeys(("stream_mean_square", "stream_variance"), 1.0) | {"stream_max_abs": 7.0}
    statistics: dict[str, list[float | None]] = {}
    for name, values in stream.items():
        statistics[name] = [*values.tolist(), final.get(name) if placement != "post" else None]
    statistics["angular_distance"][0] = None
    for name, values in sublayer.items():
        statistics[name] = [None, *values[1:].tolist(), None]
    if broken:
        for name in ("stream_max_abs", "stream_variance", "mlp_mean_square"):
            statistics[name][num_layers // 2] = math.nan
    return list(range(num_layers + 2)), statistics


def main(folder: Path) -> None:
    """Write a run of each placement into ``folder``."""
    for placement in ("pre", "post", "peri", "output"):
        lr = 1e-3 if placement == "post" else 2e-3
        print(write_run(folder / placement, placement, steps=2000, num_layers=24, lr=lr))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
