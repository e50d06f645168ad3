"""The datasets that the flags name: whole, and readable from this node."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from megatron_periln.doctor.rows import Row
from megatron_periln.errors import UsageError

__all__ = ["check_datasets"]

_CHECK = "datasets"
_BLOCK = 1 << 16


def check_datasets(options: Namespace) -> Iterator[Row]:
    """Check every dataset that the flags name: whole, and readable from its first byte to its last."""
    prefixes = sorted({word for word in _words(options) if not _is_number(word)})
    if not prefixes:
        if options.mock_data:
            yield Row(_CHECK, "ok", "mock data")
        else:
            yield Row(_CHECK, "warning", "not checked", "give --data-path, as for pretraining")
        return
    # Not before here: it needs numpy, which may be missing, or broken; that is a row.
    from megatron_periln.data.indexed.format import check_indexed_dataset

    tokens = size = 0
    failed = False
    for prefix in prefixes:
        try:
            tokens += check_indexed_dataset(prefix, every_sequence=False).tokens
            size += _read_ends(Path(f"{prefix}.bin"))
        except UsageError as error:
            failed = True
            yield Row(_CHECK, "failed", str(error))
        except OSError as error:
            failed = True
            yield Row(
                _CHECK,
                "failed",
                f"{prefix}: cannot be read: {error.strerror}",
                "mount it, or fix its permissions",
            )
    if not failed:
        yield Row(_CHECK, "ok", f"{len(prefixes)} of {tokens:,} tokens, {size / 1e9:.2f} GB")


def _words(options: Namespace) -> Iterator[str]:
    """Yield every word where Megatron expects prefixes and their weights."""
    for words in (
        options.data_path,
        options.train_data_path,
        options.valid_data_path,
        options.test_data_path,
    ):
        yield from words
    if options.data_args_path:
        yield from Path(options.data_args_path).read_text().split()
    if options.per_split_data_args_path:
        for words in json.loads(Path(options.per_split_data_args_path).read_text()).values():
            yield from words or []


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _read_ends(path: Path) -> int:
    """Read the file's first and last bytes; return its size."""
    with path.open("rb") as stream:
        stream.read(_BLOCK)
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(size - _BLOCK, 0))
        stream.read(_BLOCK)
    return size
