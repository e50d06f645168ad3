"""The error that every step of preprocessing raises."""

__all__ = ["PreprocessError"]


class PreprocessError(ValueError):
    """What is wrong with the input, the flags or the machine, and what to do, in one line."""
