"""Errors that a user can put right: each message says what was wrong, where, and what to do."""

__all__ = ["PreprocessError", "RankError", "ReportError", "UsageError"]


class UsageError(Exception):
    """Bad input: the message says what was wrong, where, and what to do."""


class RankError(UsageError):
    """One that the other ranks don't know of: told by the rank that raises it, not by the first alone."""


class PreprocessError(UsageError):
    """What is wrong with a corpus, a dataset or a tokenizer, or the flags or the machine, in one line."""


class ReportError(UsageError):
    """A run that cannot be read, or a page that cannot be written."""
