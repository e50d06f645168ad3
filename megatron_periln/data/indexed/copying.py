"""Copying of large files: within the kernel where the file systems can, else in blocks."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import BinaryIO

from megatron_periln.errors import PreprocessError

__all__ = ["append_file"]

_BLOCK = 1 << 23
_CANNOT_COPY_RANGE = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM)


def append_file(source: Path, target: BinaryIO) -> None:
    """Append the file ``source`` to ``target``, which is open without a buffer.

    Raises
    ------
    PreprocessError
        If the source becomes shorter meanwhile.
    """
    with source.open("rb", buffering=0) as stream:
        remaining = os.fstat(stream.fileno()).st_size
        while remaining and (copied := _copy_range(stream, target, remaining)):
            remaining -= copied
        while remaining:
            block = stream.read(min(_BLOCK, remaining))
            if not block:
                raise PreprocessError(f"{source}: became shorter while it was read: merge again")
            remaining -= len(block)
            view = memoryview(block)
            while view:
                view = view[target.write(view) :]


def _copy_range(source: BinaryIO, target: BinaryIO, most: int) -> int:
    """Return the number of bytes copied; 0 where the kernel cannot, or at the end of the source."""
    try:
        return os.copy_file_range(source.fileno(), target.fileno(), most)
    except OSError as error:
        if error.errno not in _CANNOT_COPY_RANGE:
            raise
        return 0
