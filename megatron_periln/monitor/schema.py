"""What a monitor's file holds: JSON Lines, one object a line, whose ``kind`` says what it is.

``docs/monitor.md`` is the schema for readers in other languages; a test holds it to this module.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_periln.errors import UsageError

__all__ = [
    "ALERTS",
    "FILE_NAME",
    "HEADER",
    "KINDS",
    "SCHEMA_VERSION",
    "STATISTICS",
    "STEP",
    "RecordError",
    "from_json",
    "to_json",
]

SCHEMA_VERSION = 1
FILE_NAME = "monitor.jsonl"

KINDS = ("run", "step", "layers", "alert")

HEADER = ("version", "name", "placement", "num_layers", "hidden_size", "parameters", "flags", "started")

STEP = ("loss", "grad_norm", "learning_rate", "tokens", "seconds")

STATISTICS: dict[str, str] = {
    "stream_mean_square": "mean(x^2) of the residual stream x after the layer",
    "stream_variance": "mean(x^2) - mean(x)^2 of the residual stream",
    "stream_max_abs": "max |x| of the residual stream",
    "stream_fp16_half_fraction": "share of elements of x with |x| > 65,504/2",
    "angular_distance": "mean over tokens of arccos(cos(x_before, x_after))/pi: 0 same direction, 1 opposite",
    "stream_gradient_norm": "L2 norm of the loss's gradient with respect to the residual stream",
    "attention_mean_square": "mean(a^2) of the attention's output a before its output norm",
    "attention_variance": "mean(a^2) - mean(a)^2 before the output norm",
    "attention_output_mean_square": "mean(a^2) of what is added to the stream: after the output norm",
    "attention_output_variance": "mean(a^2) - mean(a)^2 of what is added to the stream",
    "attention_ratio": "RMS of what attention adds / RMS of the stream that it is added to",
    "attention_gradient_norm": "L2 norm of the gradient of attention's parameters",
    "attention_gain_mean": "mean of the gain of attention's output norm",
    "attention_gain_min": "its minimum",
    "attention_gain_max": "its maximum",
    "mlp_mean_square": "mean(m^2) of the MLP's output m before its output norm",
    "mlp_variance": "mean(m^2) - mean(m)^2 before the output norm",
    "mlp_output_mean_square": "mean(m^2) of what is added to the stream: after the output norm",
    "mlp_output_variance": "mean(m^2) - mean(m)^2 of what is added to the stream",
    "mlp_ratio": "RMS of what the MLP adds / RMS of the stream that it is added to",
    "mlp_gradient_norm": "L2 norm of the gradient of the MLP's parameters",
    "mlp_gain_mean": "mean of the gain of the MLP's output norm",
    "mlp_gain_min": "its minimum",
    "mlp_gain_max": "its maximum",
    "norm_gradient_norm": "L2 norm of the gradient of the gains (and biases) of the layer's norms",
}

ALERTS: dict[str, str] = {
    "loss-spike": "the loss jumps above its recent level",
    "gradient-spike": "the global gradient norm jumps above its recent level",
    "nan": "NaN or Inf in the loss, the gradient norm or a layer's statistic",
    "fp16-range": "max |x| of the residual stream nears or passes FP16's largest number, 65,504",
    "fp8-range": "max |x| of the residual stream passes FP8 E4M3's largest number, 448: for information",
    "dead-gain": "every gain of an output norm is almost 0: the sublayer adds nothing",
    "exploding-gain": "a gain of an output norm is very large",
    "record": "lines that could not be written to this file",
}


class RecordError(UsageError):
    """A monitor's file that cannot be read, or does not fit the run."""


def to_json(value: Any) -> Any:
    """Return ``value`` for JSON: NaN and infinities become "nan", "inf" and "-inf", strange objects text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if hasattr(value, "__index__"):  # an integer of numpy's
        return int(value)
    if hasattr(value, "__float__"):
        return to_json(float(value))
    return str(value)


def from_json(value: float | str | None) -> float:
    """Return the number that `to_json` wrote; what was None is NaN.

    Raises
    ------
    ValueError
        If it is no number.
    """
    return math.nan if value is None else float(value)
