"""A rank that has failed ends, whatever waits in its way."""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["ends_in_time"]

_SECONDS = 60  # what a rank may take from its error to its end: the last lines of its log, an upload of them


@contextmanager
def ends_in_time() -> Iterator[None]:
    """Have a process that leaves this by an error end within a minute, with status 1.

    On the way out, Python waits for threads that are no daemons, for what libraries have registered to be
    called at its end, and for groups of ranks to be taken down, some of which are gone. The thread that ends
    the process is not Python's, and shows where it stood.
    """
    try:
        yield
    except BaseException as error:
        if not (isinstance(error, SystemExit) and error.code in (None, 0)):
            faulthandler.dump_traceback_later(_SECONDS, exit=True, file=2)
        raise
