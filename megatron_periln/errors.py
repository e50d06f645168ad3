"""Errors that a user can mend."""

__all__ = ["RankError", "UsageError"]


class UsageError(Exception):
    """Bad input: the message says what was wrong, where, and what to do."""


class RankError(UsageError):
    """One that the other ranks don't know of: told by the rank that raises it, not by the first alone."""
