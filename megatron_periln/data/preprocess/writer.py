"""From the growing files of a dataset to its final ones: complete, or absent.

The bytes are those of ``IndexedDatasetBuilder`` (megatron/core/datasets/indexed_dataset.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_periln.data.indexed.format import DTYPES, HEADER, MAGIC, VERSION
from megatron_periln.data.indexed.index_arrays import BLOCK
from megatron_periln.data.indexed.sidecar import Sidecar, sha256_of, sidecar_path
from megatron_periln.data.output_files import writing
from megatron_periln.files import sync

__all__ = ["publish", "write_index"]


def write_index(stem: str, dtype: np.dtype) -> str:
    """Write ``{stem}.idx`` from ``{stem}.lengths`` and ``{stem}.documents``; return its SHA-256.

    Parameters
    ----------
    stem
        The path of the growing dataset, without suffix.
    dtype
        The dtype of the tokens.
    """
    sequences = Path(f"{stem}.lengths").stat().st_size // np.dtype(np.int32).itemsize
    documents = Path(f"{stem}.documents").stat().st_size // np.dtype(np.int64).itemsize
    code = next(code for code, known in DTYPES.items() if known == dtype)
    path = Path(f"{stem}.idx")
    with path.open("wb") as idx:
        idx.write(HEADER.pack(MAGIC, VERSION, code, sequences, documents + 1))
        for lengths in _blocks(f"{stem}.lengths", np.int32):
            idx.write(lengths.tobytes())
        offset = 0
        for lengths in _blocks(f"{stem}.lengths", np.int32):
            ends = offset + np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
            idx.write(np.concatenate([[offset], ends[:-1]]).astype(np.int64).tobytes())
            offset = int(ends[-1])
        last = 0
        idx.write(np.zeros(1, np.int64).tobytes())
        for counts in _blocks(f"{stem}.documents", np.int64):
            ends = last + np.cumsum(counts)
            idx.write(ends.tobytes())
            last = int(ends[-1])
    sync(path)
    return sha256_of(path)


def publish(
    stem: str,
    prefix: str,
    dtype: np.dtype,
    bin_sha256: str | None,
    sidecar: Sidecar,
) -> list[Path]:
    """Give a complete dataset its final names, the .idx last: it never stands without its .bin.

    What was published before is left as it is, so that this can be done again after it was cut off.

    Parameters
    ----------
    stem
        The path of the growing dataset, without suffix.
    prefix
        The final path, without suffix.
    dtype
        The dtype of the tokens.
    bin_sha256
        The SHA-256 of the .bin file, if it is known.
    sidecar
        What the dataset was made of; its ``sha256`` is filled in.

    Raises
    ------
    PreprocessError
        If a file cannot be written.
    """
    bin_, idx, json = Path(prefix + ".bin"), Path(prefix + ".idx"), sidecar_path(prefix)
    growing = Path(stem + ".bin")
    with writing(prefix):
        sha256 = {
            "bin": bin_sha256 or sha256_of(growing if growing.exists() else bin_),
            "idx": write_index(stem, dtype),
        }
        Path(stem + ".json").write_text(replace(sidecar, sha256=sha256).to_json(), encoding="utf-8")
        sync(Path(stem + ".json"))
        for old in (idx, json):
            old.unlink(missing_ok=True)
        if growing.exists():
            growing.replace(bin_)
        Path(stem + ".json").replace(json)
        Path(stem + ".idx").replace(idx)
        sync(idx.parent)
    return [bin_, idx, json]


def _blocks(path: str, dtype: type[np.generic]) -> Iterator[NDArray[Any]]:
    with Path(path).open("rb") as stream:
        while (block := np.fromfile(stream, dtype, BLOCK)).size:
            yield block
