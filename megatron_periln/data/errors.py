"""The error that every step of preprocessing raises."""

from megatron_periln.errors import UsageError

__all__ = ["PreprocessError"]


class PreprocessError(UsageError):
    """What is wrong with the input, the flags or the machine, and what to do, in one line."""
