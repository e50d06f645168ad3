"""Which encoders gave Megatron's ids for all probes of a tokenizer, remembered beside its entry in the cache.

A proof is of an entry, whose key has versions and our code, of the very files of the libraries, of the
processor, whose instructions they choose by, and of Python. Whatever of them is another makes it none.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import platform
import sys
from contextlib import suppress
from pathlib import Path

from megatron_periln.data.tokenizers.cache import cache_folder
from megatron_periln.data.tokenizers.resolved_tokenizer import ResolvedTokenizer
from megatron_periln.files import write_text

__all__ = ["is_proven", "remember"]

_PROCESSOR = (
    *("vendor_id", "cpu family", "model", "model name", "flags"),
    *("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "Features"),
)
_FIRST_PROCESSOR = 1 << 13


def is_proven(resolved: ResolvedTokenizer, encoder: str) -> bool:
    """Whether an encoder gave Megatron's ids for the probes before, here and in everything as now."""
    proof = _proof(resolved, encoder)
    try:
        return proof is not None and _file(resolved, encoder).read_text() == proof
    except (OSError, ValueError):
        return False


def remember(resolved: ResolvedTokenizer, encoder: str) -> None:
    """Note that an encoder gave Megatron's ids for the probes, where the cache can be written."""
    if proof := _proof(resolved, encoder):
        with suppress(OSError):
            write_text(_file(resolved, encoder), proof)


def _file(resolved: ResolvedTokenizer, encoder: str) -> Path:
    return cache_folder() / str(resolved.entry) / f"proof-{encoder}"


def _proof(resolved: ResolvedTokenizer, encoder: str) -> str | None:
    """Return a sha256 of what a proof is of; None for a tokenizer that is in no cache, or files unknown."""
    if resolved.entry is None:
        return None
    try:
        sums = (cache_folder() / resolved.entry / "sha256.json").read_text()
        files = [_library(name) for name in (encoder, resolved.kind)]
        of = [resolved.entry, encoder, sums, files, _processor(), sys.version]
    except (OSError, ValueError):
        return None
    return hashlib.sha256(json.dumps(of).encode()).hexdigest()


def _library(name: str) -> list[tuple[str, int, int]]:
    """Return the compiled files of a package, and what tells one from another; without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(name)
    files = [(path, path.stat()) for path in sorted(Path(spec.origin).parent.glob("*.so"))]
    return [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in files]


def _processor() -> list[str]:
    with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as stream:
        first = stream.read(_FIRST_PROCESSOR).partition("\n\n")[0]
    lines = [line for line in first.splitlines() if line.partition(":")[0].strip() in _PROCESSOR]
    return [platform.machine(), *lines]
