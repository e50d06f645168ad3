"""Errors that a user can put right: each message says what was wrong, where, and what to do."""

from __future__ import annotations

import os
import sys
import traceback

__all__ = [
    "FLAG",
    "TRACEBACK",
    "PreprocessError",
    "RankError",
    "ReportError",
    "UsageError",
    "tell",
    "with_kind",
]

TRACEBACK = "MEGATRON_PERILN_TRACEBACK"
"""The environment variable, and `FLAG` the flag of training, that show tracebacks before that line."""

FLAG = "--traceback"


class UsageError(Exception):
    """Bad input: the message says what was wrong, where, and what to do.

    Attributes
    ----------
    status
        What training, which it ends, is to end with.
    """

    status = 1


class RankError(UsageError):
    """One that the other ranks don't know of: told by the rank that raises it, not by the first alone."""


class PreprocessError(UsageError):
    """What is wrong with a corpus, a dataset or a tokenizer, or the flags or the machine, in one line."""


class ReportError(UsageError):
    """A run that cannot be read, or a page that cannot be written."""


def with_kind(error: BaseException, most: int | None = None) -> str:
    """Return an error's kind and what it says, in one line; of that ``most`` characters at most."""
    kind, said = type(error).__name__, " ".join(str(error).split())[:most].rstrip()
    return f"{kind}: {said}" if said else kind


def tell(error: BaseException, *, speaks: bool = True) -> None:
    """Print the one line of an error, after its traceback if `TRACEBACK` asks for it.

    Parameters
    ----------
    error
        As it was caught.
    speaks
        Whether this is the rank that tells of it; the others print no more than a traceback.
    """
    if os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    if speaks:
        print(f"error: {error}", file=sys.stderr, flush=True)
