"""Where and with what a run was made."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["commit", "provenance", "versions"]

_PACKAGES = ("megatron-periln", "megatron-core", "torch", "transformer-engine", "triton", "numpy")


def commit() -> str | None:
    """Return the commit of this package's repository, with ``-dirty`` after changes; None outside of one.

    A repository that holds the package somewhere deeper, such as in an environment's site-packages, is
    another's.
    """
    root = Path(__file__).resolve().parents[2]
    try:
        if Path(_git(root, "rev-parse", "--show-toplevel")).resolve() != root:
            return None
        return _git(root, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=30, check=True
    )
    return done.stdout.strip()


def versions(packages: Iterable[str] = _PACKAGES) -> dict[str, str]:
    """Return the versions of Python, and of those ``packages`` that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def provenance() -> dict[str, Any]:
    """Return the commit, and the versions of Python and of what training depends on."""
    return {"commit": commit(), "versions": versions(), "machine": platform.machine()}
