"""Memory that this process and its workers have in common, for what one reads and another encodes.

Bytes that go through a pipe are copied four times, in pieces of 64 kB, with a switch of processes for each.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["SharedBuffer", "borrow", "lending"]

_maps: list[mmap.mmap] = []
_free: list[int] = []
"""The last to be given back is the first to be lent, so that no more pages are touched than are in use."""


class SharedBuffer:
    """A part of the shared memory, until nothing refers to this object any more.

    What is pickled is where it lies, for a process that was forked after `lending` had begun: it gets a
    ``memoryview``.
    """

    def __init__(self, number: int, size: int) -> None:
        self._number, self._map = number, _maps[number]
        self.view = memoryview(self._map)[:size]

    def __len__(self) -> int:
        return len(self.view)

    def __reduce__(self) -> tuple[Any, ...]:
        return _view, (self._number, len(self.view))

    def __del__(self) -> None:
        # Not after the end of ``lending``, nor to the next one, which lends that number itself.
        if self._number < len(_maps) and _maps[self._number] is self._map:
            _free.append(self._number)


@contextmanager
def lending(number: int, size: int) -> Iterator[None]:
    """Have ``number`` buffers of ``size`` bytes at hand, which take memory once they are written to."""
    try:
        _maps.extend(mmap.mmap(-1, size) for _ in range(number))
    except OSError:  # of a system that promises no memory that it does not have
        _maps.clear()
    _free.extend(range(len(_maps)))
    try:
        yield
    finally:
        _maps.clear()
        _free.clear()


def borrow(size: int) -> SharedBuffer | None:
    """Return a buffer of at least ``size`` bytes, None if there is none."""
    if not _free or size > len(_maps[0]):
        return None
    return SharedBuffer(_free.pop(), size)


def _view(number: int, size: int) -> memoryview:
    return memoryview(_maps[number])[:size]
