"""What tells the data of an indexed dataset from others that had its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_periln.data.indexed.format import HEADER
from megatron_periln.data.indexed.sidecar import Sidecar, sidecar_path
from megatron_periln.errors import PreprocessError

__all__ = ["Content", "content_of"]

Content = dict[str, Any]


def content_of(prefix: str) -> Content:
    """Return what tells the data of an indexed dataset from others: no more work for a large one.

    The checksums in its sidecar, if that is of these files: not older than they, and of their size.
    Else their sizes and times.
    """
    bin_, idx = (Path(f"{prefix}{suffix}").stat() for suffix in (".bin", ".idx"))
    sizes = [bin_.st_size, idx.st_size]
    try:
        sidecar, written = Sidecar.read_summary(sidecar_path(prefix)), sidecar_path(prefix).stat().st_mtime_ns
        itemsize = np.dtype(sidecar.dtype).itemsize
    except (PreprocessError, OSError, TypeError):  # none that can be read
        pass
    else:
        described = [
            sidecar.tokens * itemsize,
            HEADER.size + 12 * sidecar.sequences + 8 * (sidecar.documents + 1),
        ]
        if written >= max(bin_.st_mtime_ns, idx.st_mtime_ns) and described == sizes:
            return {"bytes": sizes, "sha256": [sidecar.sha256["bin"], sidecar.sha256["idx"]]}
    return {"bytes": sizes, "modified": [bin_.st_mtime_ns, idx.st_mtime_ns]}
