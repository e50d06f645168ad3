"""Installed packages that don't fit each other, known by their versions alone: importing them may fail."""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_periln.errors import UsageError

__all__ = ["VersionMismatch", "find_version_mismatch", "refuse_version_mismatch"]

_LEAST_NVRX = (0, 6)
"""NVRX_MIN_VERSION of megatron/core/dist_checkpointing/strategies/nvrx.py."""

_ASKED_BY = "checkpointing/async_ckpt/cached_metadata_filesystem_reader.py"
"""With this file, megatron-core takes nvidia-resiliency-ext for one that it can use, and asks its version."""


@dataclass(frozen=True)
class VersionMismatch:
    """Packages that don't fit each other.

    Attributes
    ----------
    what
        Both, with their versions, and what does not work.
    remedy
        What to install.
    """

    what: str
    remedy: str


def find_version_mismatch() -> VersionMismatch | None:
    """Return what keeps megatron-core from being imported, None if nothing is known to."""
    # 30 ms, which the help of a tool need not take.
    import importlib.metadata
    import platform

    try:
        megatron = importlib.metadata.version("megatron-core")
        nvrx = importlib.metadata.distribution("nvidia-resiliency-ext")
    except importlib.metadata.PackageNotFoundError:
        return None
    if tuple(map(int, re.findall(r"\d+", nvrx.version)[:2])) >= _LEAST_NVRX:
        return None
    if not any(str(file).endswith(_ASKED_BY) for file in nvrx.files or ()):
        return None
    least, libc = ".".join(map(str, _LEAST_NVRX)), " ".join(platform.libc_ver())
    return VersionMismatch(
        f"nvidia-resiliency-ext {nvrx.version} does not fit megatron-core {megatron}, which can't be "
        f"imported beside one older than {least}",
        f"pip uninstall nvidia-resiliency-ext, or pip install 'nvidia-resiliency-ext>={least}' (its wheels "
        f"need glibc 2.39; here is {libc or 'another C library'})",
    )


def refuse_version_mismatch() -> None:
    """Refuse to go on where megatron-core can't be imported: before it is, for that ends in a traceback.

    Raises
    ------
    UsageError
        With both versions, and what to install.
    """
    if mismatch := find_version_mismatch():
        raise UsageError(f"{mismatch.what}; {mismatch.remedy}")
