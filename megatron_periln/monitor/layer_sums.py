"""What is summed over tokens for the statistics of the layers.

Everything is a sum or a maximum, so that it can be taken over microbatches, ranks and pipeline
stages in any order. Row ``n`` of a `Sums` is layer ``n``: 0 the embedding's output, ``1 .. L`` the
layers, ``L + 1`` the final norm's output; one more row holds what belongs to none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_periln.monitor.statistics import STATISTICS, SUBLAYERS, Extreme, Statistic

__all__ = ["FP16_HALF", "Sums", "angular_distance", "per_token", "square_and_variance"]

FP16_HALF = 65504 / 2

_OF_OUTPUT = ("mean_square", "variance", "output_mean_square", "output_variance")
_PARAMETER_GRADIENTS = [f"{part}_gradient" for part in (*SUBLAYERS, "norm", "other")]

# What is summed, by group. The first column of a group counts what was summed: where it is zero,
# the statistics made of the group do not apply.
_GROUPS: dict[str, tuple[str, ...]] = {
    "stream": ("tokens", "mean_square", "variance", "fp16_half_fraction"),
    "angle": ("tokens", "angular_distance"),
    "stream_gradient": ("tensors", "square"),
    **dict.fromkeys(SUBLAYERS, ("tokens", *_OF_OUTPUT, "residual_mean_square")),
    **dict.fromkeys(_PARAMETER_GRADIENTS, ("tensors", "square")),
    **{f"{sublayer}_weight": ("elements", "sum") for sublayer in SUBLAYERS},
    **{f"{sublayer}_scales": ("microbatches", "residual_scale", "output_scale") for sublayer in SUBLAYERS},
    "loss": ("tokens",),
}
_COLUMNS = [(group, name) for group, names in _GROUPS.items() for name in names]
_SLICES = {
    group: slice(_COLUMNS.index((group, names[0])), _COLUMNS.index((group, names[-1])) + 1)
    for group, names in _GROUPS.items()
}
_EXTREMES = [statistic for statistic in STATISTICS.values() if isinstance(statistic.made_of, Extreme)]


class Sums:
    """Sums and maxima of every layer, on the device; nothing here waits for it before `values`.

    Parameters
    ----------
    num_layers
        ``L``, over all pipeline stages.
    device
        Where to keep them.

    Notes
    -----
    Statistics of a microbatch are computed in fp32; they are added up in fp64.
    """

    def __init__(self, num_layers: int, device: torch.device | str = "cuda") -> None:
        self.rest = num_layers + 2
        self.sums = torch.zeros(num_layers + 3, len(_COLUMNS), dtype=torch.float64, device=device)
        self.maxima = torch.full((num_layers + 3, len(_EXTREMES)), -math.inf, device=device)

    def add(self, group: str, row: int, sums: Tensor) -> None:
        """Add ``sums``, one for each column of ``group``."""
        self.sums[row, _SLICES[group]] += sums

    def include(self, statistic: Statistic, row: int, value: Tensor) -> None:
        """Include ``value`` in a maximum, or in a minimum, which is kept negated; NaN stays NaN."""
        assert isinstance(statistic.made_of, Extreme)
        kept = self.maxima[row, _EXTREMES.index(statistic)]
        torch.maximum(kept, statistic.made_of.sign * value, out=kept)

    def scale(self, group: str, factor: Tensor | float) -> None:
        """Multiply the sums of ``group``, but for their count."""
        self.sums[:, _SLICES[group]][:, 1:] *= factor

    def reduce(self) -> None:
        """Reduce the sums and maxima over all ranks; every rank must call it."""
        torch.distributed.all_reduce(self.sums)
        # A maximum over ranks may lose a NaN (gloo's does), a sum does not.
        not_a_number = self.maxima.isnan().double()
        torch.distributed.all_reduce(not_a_number)
        torch.distributed.all_reduce(self.maxima, op=torch.distributed.ReduceOp.MAX)
        self.maxima.masked_fill_(not_a_number > 0, math.nan)

    def total(self, group: str) -> Tensor:
        """Return the sums of ``group`` over all rows."""
        return self.sums[:, _SLICES[group]].sum(0)

    def counts(self, group: str) -> list[float]:
        """Return how many tokens, elements or tensors ``group`` has seen in each row."""
        return self.sums[:, _SLICES[group]][:, 0].tolist()

    def values(self, layers: Sequence[int]) -> dict[str, list[float | None]]:
        """Return every statistic of ``layers``; None where it does not apply."""
        sums, maxima = self.sums.tolist(), self.maxima.tolist()

        def sum_of(row: int, group: str, column: str) -> float:
            return sums[row][_COLUMNS.index((group, column))]

        def value(row: int, statistic: Statistic) -> float | None:
            made_of = statistic.made_of
            group = made_of.group
            if sum_of(row, group, _GROUPS[group][0]) == 0:
                return None
            if isinstance(made_of, Extreme):
                return made_of.sign * maxima[row][_EXTREMES.index(statistic)]
            numerator, denominator = sum_of(row, group, made_of.numerator), 1.0
            if made_of.denominator is not None:
                denominator = sum_of(row, group, made_of.denominator)
            quotient = numerator / denominator if denominator else math.nan
            return math.sqrt(quotient) if made_of.root else quotient

        return {name: [value(row, statistic) for row in layers] for name, statistic in STATISTICS.items()}

    def gradient_norm(self) -> float:
        """Return the norm of all parameters' gradients, Megatron's ``grad norm``."""
        return math.sqrt(sum(self.total(group)[1].item() for group in _PARAMETER_GRADIENTS))


def per_token(columns: Sequence[Tensor]) -> Tensor:
    """Return the number of tokens, and the sum over tokens of each column, a value a token."""
    counted = torch.stack([torch.ones_like(columns[0]), *columns])
    return counted.flatten(1).sum(1, dtype=torch.float64)


def square_and_variance(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return each token's mean square and variance over the hidden dimension, of fp32 ``[..., hidden]``."""
    variance, mean = torch.var_mean(x, dim=-1, correction=0)
    return variance + mean.square(), variance


def angular_distance(x: Tensor, y: Tensor) -> Tensor:
    """Return each token's angle between ``x`` and ``y``, ``[..., hidden]``, in units of pi.

    This is ``arccos(cos(x, y)) / pi`` in Kahan's form, which keeps its precision where the vectors
    are almost parallel, as those of neighbouring layers are ("How Futile are Mindless Assessments
    of Roundoff in Floating-Point Computation?", 2006, section 12).
    """
    x, y = (torch.nn.functional.normalize(v, dim=-1, eps=torch.finfo(v.dtype).tiny) for v in (x, y))
    return 2 / math.pi * torch.atan2((x - y).norm(dim=-1), (x + y).norm(dim=-1))
