"""The thresholds of alerts, as data."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["GAIN_LIMITS", "RANGES", "STOPS", "GainLimits", "Range"]


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
class GainLimits:
    """Output gains that are dead or exploding, as multiples of the gains' initial value."""

    dead: float = 0.01
    exploding: float = 100.0


GAIN_LIMITS = GainLimits()

STOPS: dict[str, frozenset[str]] = {
    "nan": frozenset({"nan"}),
    "spike": frozenset({"loss-spike", "gradient-spike"}),
}
