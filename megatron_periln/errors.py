"""Errors that a user can mend."""

__all__ = ["UsageError"]


class UsageError(Exception):
    """Bad input: the message says what was wrong, where, and what to do."""
