"""Errors of the report."""

from megatron_periln.errors import UsageError

__all__ = ["ReportError"]


class ReportError(UsageError):
    """A run that cannot be read, or a page that cannot be written."""
