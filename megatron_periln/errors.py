"""Errors that a user can put right: each message says what was wrong, where, and what to do."""

from __future__ import annotations

import os
import sys
import traceback

__all__ = ["TRACEBACK", "PreprocessError", "RankError", "ReportError", "UsageError", "tell"]

TRACEBACK = "MEGATRON_PERILN_TRACEBACK"
"""The environment variable that has the traceback printed before the one line of an error."""


class UsageError(Exception):
    """Bad input: the message says what was wrong, where, and what to do."""


class RankError(UsageError):
    """One that the other ranks don't know of: told by the rank that raises it, not by the first alone."""


class PreprocessError(UsageError):
    """What is wrong with a corpus, a dataset or a tokenizer, or the flags or the machine, in one line."""


class ReportError(UsageError):
    """A run that cannot be read, or a page that cannot be written."""


def tell(error: BaseException) -> None:
    """Print the one line of an error, after its traceback if `TRACEBACK` asks for it."""
    if os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    print(f"error: {error}", file=sys.stderr, flush=True)
