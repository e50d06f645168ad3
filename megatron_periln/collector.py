"""Python's collector of cycles, out of the way while a process imports what it needs.

It runs again and again over the growing heap of what is imported, a tenth of the time that takes, and finds
next to nothing.
"""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["paused"]


@contextmanager
def paused() -> Iterator[None]:
    """Collect nothing in here; and afterwards pass over what is there by then: it stays to the end."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        # Python frees what it can at the end; nanobind calls the rest leaks, and lists them.
        atexit.register(gc.unfreeze)
