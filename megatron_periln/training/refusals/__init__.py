"""What Megatron refuses, in words that name the flags."""

from megatron_periln.training.refusals.one_line import refusals_in_one_line, why_refused
from megatron_periln.training.refusals.trial import Trial, try_validation

__all__ = ["Trial", "refusals_in_one_line", "try_validation", "why_refused"]
