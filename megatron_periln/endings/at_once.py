"""A process that has done all of its work ends without taking itself apart."""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
import threading

__all__ = ["end_at_once"]


def end_at_once() -> None:
    """End this process with status 0, as `multiprocessing` ends those that it has forked.

    Threads are waited for, what is registered for the end is called, and what was printed is written.
    What is left out is what follows in Python: it looks through a million objects for garbage and frees what
    it can, about half a second that the kernel doesn't need. So a file that is neither closed nor flushed by
    what opened it stays as it is, and a temporary file that goes with its object stays. A process that is
    profiled, traced or kept for a prompt returns from here, and ends as Python does.
    """
    if _is_watched():
        return
    for end in (threading._shutdown, atexit._run_exitfuncs):  # type: ignore[attr-defined]
        try:
            end()
        except BaseException:  # such as an interrupt: Python tells it too, and ends with the same status
            sys.excepthook(*sys.exc_info())
    try:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except (OSError, ValueError, AttributeError):  # full, closed, none
        return
    ctypes.CDLL(None).fflush(None)  # what C code has printed
    os._exit(0)


def _is_watched() -> bool:
    tools = (sys.monitoring.get_tool(number) for number in range(6))
    return bool(
        sys.flags.inspect
        or os.environ.get("PYTHONINSPECT")
        or sys.getprofile()
        or sys.gettrace()
        or any(tools)
    )
