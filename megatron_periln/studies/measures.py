"""What a study takes from a finished run: numbers from its record, the monitor's file, and its log."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_periln.monitor.reading import Run
from megatron_periln.monitor.statistics import ANGULAR_DISTANCE, STREAM_MAX_ABS, STREAM_VARIANCE, SUBLAYERS

__all__ = ["MEASURES", "Measure", "broken_off", "depth_profiles", "measure", "validation_loss"]

_VALIDATION = re.compile(
    r"validation loss at iteration \d+ (?:on validation set )?\| lm loss value: ([\dEe.+-]+|nan|inf)"
)

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One number of a run, and how tables show it; ``of`` gives NaN where the run has none."""

    title: str
    of: Callable[[Run], float]
    form: str = ".3g"


def layer_gradients(run: Run) -> Floats:
    """Return the gradient norm of each layer's attention and MLP together, ``[intervals, layers]``."""
    attention, mlp = (run.layers.values[of.gradient_norm.name] for of in SUBLAYERS.values())
    return np.sqrt(attention**2 + mlp**2)


def _inner(run: Run) -> NDArray[np.bool_]:
    """Tell which columns are layers: neither the embedding nor the final norm's output."""
    return (run.layers.layers > 0) & (run.layers.layers <= run.header["num_layers"])


def _last_variance(interval: int) -> Callable[[Run], float]:
    return lambda run: float(run.layers.values[STREAM_VARIANCE.name][interval][_inner(run)][-1])


def _spread(run: Run) -> float:
    last = layer_gradients(run)[-1][_inner(run)]
    return float(last.max() / last.min())


def _alerts(kind: str) -> Callable[[Run], float]:
    return lambda run: float(sum(alert["alert"] == kind for alert in run.alerts))


def _largest(run: Run) -> float:
    stream = run.layers.layers <= run.header["num_layers"]
    return float(run.layers.values[STREAM_MAX_ABS.name][:, stream].max())


def _later_gradients(run: Run) -> Floats:
    """Return the gradient norms after the first quarter of the run, over their median."""
    norms = run.steps.grad_norm[len(run.steps.grad_norm) // 4 :]
    return np.asarray(norms / np.nanmedian(norms))


def _effective_depth(run: Run) -> float:
    """Return how many equal parts the last layer's stream would have, in sublayers: 1 over Σ share².

    A sublayer's share is that of its square at the end, as if parts were at right angles to each other:
    what it adds is ``r² / (1 + r²)`` of the new stream, with r its ratio to the stream that it is added to,
    and what was there before keeps the rest. Norms and scales of the stream change no share.
    """
    last = [run.layers.values[of.ratio.name][-1][_inner(run)] for of in SUBLAYERS.values()]
    ratios = np.stack(last, axis=1)
    shares = [1.0]  # of the embedding
    for ratio in ratios[np.isfinite(ratios)]:
        new = ratio**2 / (1 + ratio**2)
        shares = [*(share * (1 - new) for share in shares), new]
    return float(1 / np.square(shares).sum()) if len(shares) > 1 else math.nan


def _training_loss(run: Run) -> float:
    return float(run.steps.loss[-max(1, len(run.steps.loss) // 10) :].mean())


# In the order of the tables; validation_loss, from the log, comes before them.
MEASURES: dict[str, Measure] = {
    "training_loss": Measure(title="training loss, last tenth", of=_training_loss, form=".3f"),
    "loss_spikes": Measure(title="loss spikes", of=_alerts("loss-spike"), form=".1f"),
    "gradient_spikes": Measure(title="gradient spikes", of=_alerts("gradient-spike"), form=".1f"),
    "gradient_norm": Measure(
        title="gradient norm, median", of=lambda run: float(np.nanmedian(run.steps.grad_norm))
    ),
    "gradient_peak": Measure(
        title="gradient norm, largest / median", of=lambda run: float(np.nanmax(_later_gradients(run)))
    ),
    "gradient_outliers": Measure(
        title="steps above 5 medians",
        of=lambda run: float((_later_gradients(run) > 5).sum()),
        form=".1f",
    ),
    "gradient_spread": Measure(title="gradient norms of layers, max/min", of=_spread),
    "largest_activation": Measure(title="max |x|", of=_largest),
    "variance_at_start": Measure(title="variance of the last layer, first", of=_last_variance(0)),
    "variance_at_end": Measure(title="variance of the last layer, last", of=_last_variance(-1)),
    "angular_distance": Measure(
        title="angular distance",
        of=lambda run: float(run.layers.values[ANGULAR_DISTANCE.name][-1][_inner(run)].mean()),
        form=".3f",
    ),
    "effective_depth": Measure(title="effective depth, sublayers", of=_effective_depth, form=".1f"),
    "seconds": Measure(title="seconds", of=lambda run: float(run.steps.seconds.sum())),
}


def measure(run: Run, log: Path) -> dict[str, float | None]:
    """Return every measure of a run with its log, None where it has none."""
    values: dict[str, float | None] = {"validation_loss": validation_loss(log)}
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)
        for name, each in MEASURES.items():
            try:
                value = each.of(run)
            except (KeyError, IndexError, ValueError):
                value = math.nan
            values[name] = float(f"{value:.6g}") if math.isfinite(value) else None
    return values


def validation_loss(log: Path) -> float | None:
    """Return the last validation loss that a log tells, None if it tells none; it may be NaN."""
    found = _VALIDATION.findall(log.read_text(errors="replace"))
    return float(found[-1]) if found else None


def broken_off(run: Run) -> tuple[str | None, str | None]:
    """Return what a run's record says against it.

    Returns
    -------
    tuple
        The first NaN or Inf of its loss, gradient norm or layers, and where it ended if that was before
        ``--train-iters``; None for what is not so.
    """
    messages = [f"{alert['message']}, iteration {alert['iteration']}" for alert in run.alerts]
    broken = [text for text, alert in zip(messages, run.alerts, strict=True) if alert["alert"] == "nan"]
    last, due = int(run.steps.iteration.max(initial=0)), run.header["flags"].get("train_iters") or 0
    return next(iter(broken), None), f"it ended at iteration {last} of {due}" if last < due else None


def depth_profiles(run: Run) -> dict[str, Any]:
    """Return statistics by depth, each at the first and at the last interval, with four digits.

    Layers go from 0, the embedding's output, to the last; where a statistic has no meaning, None.
    """
    kept = run.layers.layers <= run.header["num_layers"]
    statistics = {
        "variance": run.layers.values[STREAM_VARIANCE.name],
        "largest": run.layers.values[STREAM_MAX_ABS.name],
        "angular_distance": run.layers.values[ANGULAR_DISTANCE.name],
        "gradient_norm": layer_gradients(run),
    }
    return {
        "iterations": run.layers.iteration[[0, -1]].tolist(),
        **{
            name: [[_rounded(value) for value in values[interval][kept]] for interval in (0, -1)]
            for name, values in statistics.items()
        },
    }


def _rounded(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None
