"""The statistics of a layer: the one table of their names, what they mean and how each is made and shown.

Whoever needs one takes it from here, by its constant or as a field of `SUBLAYERS`, never by its name.
``docs/monitor.md`` is the table for readers of the file; a test holds it to this one. Nothing here imports
torch: reports are made without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

__all__ = [
    "ANGULAR_DISTANCE",
    "BACKWARD",
    "FORWARD",
    "NORM_GRADIENT_NORM",
    "STATISTICS",
    "STREAM_FP16_HALF_FRACTION",
    "STREAM_GRADIENT_NORM",
    "STREAM_MAX_ABS",
    "STREAM_MEAN_SQUARE",
    "STREAM_VARIANCE",
    "SUBLAYERS",
    "Extreme",
    "Quotient",
    "Statistic",
    "SublayerStatistics",
]


class Quotient(NamedTuple):
    """A quotient of sums over tokens and ranks, or its square root; no denominator means 1.

    ``group``, ``numerator`` and ``denominator`` name what `megatron_periln.monitor.layer_sums` adds up.
    """

    group: str
    numerator: str
    denominator: str | None
    root: bool = False


class Extreme(NamedTuple):
    """A maximum over elements and ranks, or with ``sign`` -1 a minimum, of what ``group`` counts."""

    group: str
    sign: int = 1


@dataclass(frozen=True)
class Statistic:
    """One number of a layer.

    Parameters
    ----------
    name
        In the monitor's file, and in TensorBoard.
    meaning
        For readers of the file.
    made_of
        How microbatches, ranks and pipeline stages are reduced to it.
    axis
        What the axis of a figure says of it.
    logarithmic
        Whether it spans orders of magnitude.
    mapped
        Whether TensorBoard has a heat map of it, by depth over training.
    """

    name: str
    meaning: str
    made_of: Quotient | Extreme
    axis: str
    logarithmic: bool = True
    mapped: bool = False


STREAM_MEAN_SQUARE = Statistic(
    "stream_mean_square",
    "mean(x^2) of the residual stream x after the layer",
    Quotient("stream", "mean_square", "tokens"),
    "mean square",
)
STREAM_VARIANCE = Statistic(
    "stream_variance",
    "mean(x^2) - mean(x)^2 of the residual stream",
    Quotient("stream", "variance", "tokens"),
    "variance",
    mapped=True,
)
STREAM_MAX_ABS = Statistic("stream_max_abs", "max |x| of the residual stream", Extreme("stream"), "max |x|")
STREAM_FP16_HALF_FRACTION = Statistic(
    "stream_fp16_half_fraction",
    "share of elements of x with |x| > 65,504/2",
    Quotient("stream", "fp16_half_fraction", "tokens"),
    "share",
    logarithmic=False,
)
ANGULAR_DISTANCE = Statistic(
    "angular_distance",
    "mean over tokens of arccos(cos(x_before, x_after))/pi: 0 same direction, 1 opposite",
    Quotient("angle", "angular_distance", "tokens"),
    "angle / π",
    logarithmic=False,
)
STREAM_GRADIENT_NORM = Statistic(
    "stream_gradient_norm",
    "L2 norm of the loss's gradient with respect to the residual stream",
    Quotient("stream_gradient", "square", None, root=True),
    "gradient norm",
    mapped=True,
)
NORM_GRADIENT_NORM = Statistic(
    "norm_gradient_norm",
    "L2 norm of the gradient of the weights (and biases) of the layer's norms",
    Quotient("norm_gradient", "square", None, root=True),
    "gradient norm",
)


class SublayerStatistics(NamedTuple):
    """The statistics of attention, or of the MLP, in the order of the file.

    ``output_`` is what is added to the stream, after the output norm and its scale; ``gain_`` are that norm's
    weights.
    """

    mean_square: Statistic
    variance: Statistic
    output_mean_square: Statistic
    output_variance: Statistic
    ratio: Statistic
    gradient_norm: Statistic
    gain_mean: Statistic
    gain_min: Statistic
    gain_max: Statistic
    residual_scale: Statistic
    output_scale: Statistic


def _of_sublayer(name: str, called: str, letter: str) -> SublayerStatistics:
    square = f"mean({letter}^2)"
    variance = f"{square} - mean({letter})^2"
    weight = f"{name}_weight"
    mean = Quotient(weight, "sum", "elements")

    def per_token(part: str, meaning: str) -> Statistic:
        axis = part.removeprefix("output_").replace("_", " ")
        return Statistic(f"{name}_{part}", meaning, Quotient(name, part, "tokens"), axis)

    def of_weight(part: str, meaning: str, made_of: Quotient | Extreme) -> Statistic:
        return Statistic(f"{name}_gain_{part}", meaning, made_of, "weight", logarithmic=False)

    def of_scales(part: str, meaning: str) -> Statistic:
        made_of = Quotient(f"{name}_scales", part, "microbatches")
        return Statistic(f"{name}_{part}", meaning, made_of, "scale", logarithmic=False)

    return SublayerStatistics(
        per_token("mean_square", f"{square} of {called}'s output {letter} before its output norm"),
        per_token("variance", f"{variance} before the output norm"),
        per_token("output_mean_square", f"{square} of what is added to the stream: after the output norm"),
        per_token("output_variance", f"{variance} of what is added to the stream"),
        Statistic(
            f"{name}_ratio",
            f"RMS of what {called} adds / RMS of the stream that it is added to",
            Quotient(name, "output_mean_square", "residual_mean_square", root=True),
            "RMS ratio",
        ),
        Statistic(
            f"{name}_gradient_norm",
            f"L2 norm of the gradient of {called}'s parameters",
            Quotient(f"{name}_gradient", "square", None, root=True),
            "gradient norm",
        ),
        of_weight("mean", f"mean of the weight of {called}'s output norm", mean),
        of_weight("min", "its minimum", Extreme(weight, sign=-1)),
        of_weight("max", "its maximum", Extreme(weight)),
        of_scales("residual_scale", f"what multiplies the stream that {called} adds to"),
        of_scales("output_scale", f"what multiplies {called}'s output, after its output norm"),
    )


SUBLAYERS: dict[str, SublayerStatistics] = {
    "attention": _of_sublayer("attention", "attention", "a"),
    "mlp": _of_sublayer("mlp", "the MLP", "m"),
}

_TABLE = (
    STREAM_MEAN_SQUARE,
    STREAM_VARIANCE,
    STREAM_MAX_ABS,
    STREAM_FP16_HALF_FRACTION,
    ANGULAR_DISTANCE,
    STREAM_GRADIENT_NORM,
    *(statistic for sublayer in SUBLAYERS.values() for statistic in sublayer),
    NORM_GRADIENT_NORM,
)
STATISTICS: dict[str, Statistic] = {statistic.name: statistic for statistic in _TABLE}
"""Every statistic by its name, in the order of the file."""

BACKWARD: tuple[Statistic, ...] = (
    STREAM_GRADIENT_NORM,
    *(sublayer.gradient_norm for sublayer in SUBLAYERS.values()),
    NORM_GRADIENT_NORM,
)
"""What the backward pass computes of a layer."""

_OF_A_FORWARD = [
    statistic
    for of in SUBLAYERS.values()
    for statistic in (
        of.mean_square, of.variance, of.gain_mean, of.gain_min, of.gain_max,
        of.residual_scale, of.output_scale,
        of.output_mean_square, of.output_variance, of.ratio,
    )
]  # fmt: skip
FORWARD: tuple[Statistic, ...] = (
    *_OF_A_FORWARD,
    *(statistic for statistic in _TABLE if statistic not in (*_OF_A_FORWARD, *BACKWARD)),
)
"""What the forward pass computes of a layer, in the order of computation: the stream comes out of it last."""
