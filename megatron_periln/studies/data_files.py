"""What the data and tokenizer files are that a run's flags name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_periln.data.indexed.content import content_of

__all__ = ["changed_since", "data_files"]

_DATASETS = ("--data-path", "--train-data-path", "--valid-data-path", "--test-data-path")
_FILES = (
    "--data-args-path",
    "--per-split-data-args-path",
    "--tokenizer-model",
    "--tokenizer-metadata",
    "--vocab-file",
    "--merge-file",
)


def data_files(
    flags: Sequence[str], known: dict[str, dict[str, Any]] | None = None
) -> dict[str, dict[str, Any]]:
    """Return what tells the files that flags name from others, by dataset or file.

    Datasets by the checksums in their sidecars, else by sizes and times; a tokenizer's files by these. What
    is not there is left out: a name on a hub, a weight of a blend. ``known`` is taken as it is, and added to:
    runs of a study mostly have the same data.
    """
    known = {} if known is None else known
    found: dict[str, dict[str, Any]] = {}
    for flag, value in _values(flags):
        if value in known and flag in (*_DATASETS, *_FILES):
            found[value] = known[value]
        elif flag in _DATASETS and Path(f"{value}.idx").exists() and Path(f"{value}.bin").exists():
            found[value] = content_of(value)
        elif flag in _FILES and Path(value).exists():
            path = Path(value)
            files = sorted(inner for inner in path.iterdir() if inner.is_file()) if path.is_dir() else [path]
            found[value] = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
    known |= found
    return found


def _values(flags: Sequence[str]) -> Iterator[tuple[str, str]]:
    flag = ""
    for word in flags:
        if word.startswith("--"):
            flag, equals, word = word.partition("=")
            if not equals:
                continue
        yield flag, word


def changed_since(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return what is another dataset or file than before; what is not there now is no other."""
    return sorted(name for name, content in before.items() if name in now and now[name] != content)
