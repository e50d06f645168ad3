"""Megatron's indexed dataset on disk: its byte format, and a check that a pair of files has it.

A dataset is ``{prefix}.bin``, the tokens back to back, and ``{prefix}.idx``: a header, then the
length of each sequence (int32), its byte offset in the .bin (int64) and the sequence at which each
document ends (int64, starting with 0); multimodal datasets end with a mode for each sequence (int8).
Source: ``_IndexWriter`` and ``_IndexReader`` (megatron/core/datasets/indexed_dataset.py).
"""

from __future__ import annotations

import glob
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_periln.errors import UsageError

__all__ = [
    "BLOCK",
    "DTYPES",
    "HEADER",
    "MAGIC",
    "VERSION",
    "IndexedDatasetError",
    "IndexedDatasetInfo",
    "blocks",
    "check_indexed_dataset",
    "without_suffix",
]

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, dtype code, number of sequences, number of entries in the document index."""

DTYPES: dict[int, np.dtype] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    6: np.dtype(np.float64),
    7: np.dtype(np.float32),
    8: np.dtype(np.uint16),
}
"""The token dtype that each dtype code stands for."""

BLOCK = 1 << 20
"""Entries of an index read at a time: what bounds the memory of every pass over one."""


class IndexedDatasetError(UsageError):
    """What is wrong with an indexed dataset, in which file, and what to do, in one line."""


@dataclass(frozen=True)
class IndexedDatasetInfo:
    """What an indexed dataset holds.

    Parameters
    ----------
    dtype
        The dtype of the tokens in the .bin file.
    sequences
        Number of sequences: documents, or sentences where documents were split.
    documents
        Number of documents, empty ones included.
    tokens
        Number of tokens in all sequences.
    """

    dtype: np.dtype
    sequences: int
    documents: int
    tokens: int


def check_indexed_dataset(
    prefix: str | Path, *, every_sequence: bool = True, may_be_empty: bool = False
) -> IndexedDatasetInfo:
    """Check that Megatron can read the indexed dataset at ``prefix``.

    Reads the .idx file and only the size of the .bin file, with numpy alone.

    Parameters
    ----------
    prefix
        Local path of the dataset without ``.bin`` or ``.idx``, as ``--data-path`` takes it.
    every_sequence
        Look at every sequence, which takes longer the larger the dataset is. Otherwise only the last
        one is looked at, which finds what was truncated where sequences are stored in order, and the
        number of tokens is what the .bin file has room for.
    may_be_empty
        Accept a dataset without tokens, as a shard may be. Megatron maps none.

    Returns
    -------
    IndexedDatasetInfo
        The token dtype and the numbers of sequences, documents and tokens.

    Raises
    ------
    IndexedDatasetError
        If a file is missing, is not of this format, is truncated, or does not fit the other.
    """
    idx, bin_ = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    _check_present(str(prefix), idx, bin_)
    dtype, sequences, documents = _read_header(idx)

    index = np.memmap(idx, mode="r", dtype=np.uint8)
    lengths_at, pointers_at = HEADER.size, HEADER.size + 4 * sequences
    lengths = index[lengths_at:pointers_at].view(np.int32)
    pointers = index[pointers_at : pointers_at + 8 * sequences].view(np.int64)
    document_ends = index[pointers_at + 8 * sequences :][: 8 * documents].view(np.int64)

    if documents == 0 or document_ends[-1] != sequences:
        raise IndexedDatasetError(
            f"{idx}: the documents do not end where the {sequences} sequences do, so the file is corrupt; "
            f"copy or preprocess the dataset again"
        )
    tokens = bytes_needed = 0
    first = 0 if every_sequence else max(sequences - 1, 0)
    for block, starts in zip(blocks(lengths[first:]), blocks(pointers[first:]), strict=True):
        tokens += int(block.sum(dtype=np.int64))
        ends = starts + block.astype(np.int64) * dtype.itemsize
        bytes_needed = max(bytes_needed, int(ends.max()))
    bytes_there = bin_.stat().st_size
    if not every_sequence:
        tokens = bytes_there // dtype.itemsize
    if tokens == 0 and not may_be_empty:
        raise IndexedDatasetError(
            f"{idx}: the dataset holds no tokens; preprocess a corpus that is not empty"
        )
    if bytes_there < bytes_needed:
        raise IndexedDatasetError(
            f"{bin_}: truncated: {bytes_there} bytes, but {idx.name} needs {bytes_needed}; "
            f"copy or preprocess the dataset again"
        )
    return IndexedDatasetInfo(dtype=dtype, sequences=sequences, documents=documents - 1, tokens=tokens)


def blocks[Entry: np.generic](array: NDArray[Entry]) -> Iterator[NDArray[Entry]]:
    """Yield ``array`` in blocks of at most ``BLOCK`` entries, in memory."""
    for start in range(0, len(array), BLOCK):
        yield np.array(array[start : start + BLOCK])


def without_suffix(name: str) -> str:
    """Return the prefix of the dataset that ``name`` stands for, with or without .bin or .idx."""
    return name[: -len(".bin")] if name.endswith((".bin", ".idx")) else name


def _check_present(prefix: str, idx: Path, bin_: Path) -> None:
    missing = [path for path in (idx, bin_) if not path.is_file()]
    if len(missing) == 1:
        present = bin_ if missing[0] == idx else idx
        raise IndexedDatasetError(
            f"{missing[0]}: no such file, though {present.name} is there; "
            f"a dataset is both files: copy the missing one or preprocess again"
        )
    if not missing:
        return
    if prefix.endswith((".bin", ".idx")):
        raise IndexedDatasetError(
            f"{prefix}: Megatron takes the prefix without .bin/.idx: use {without_suffix(prefix)}"
        )
    near = sorted(
        {
            str(path.with_suffix(""))
            for path in idx.parent.glob(glob.escape(Path(prefix).name) + "*")
            if path.suffix in (".bin", ".idx")
        }
    )
    if Path(prefix).is_file():
        raise IndexedDatasetError(
            f"{prefix}: a file, and no indexed dataset: preprocess it with tools/preprocess_data.py"
        )
    advice = (
        f"did you mean {' or '.join(near)}?" if near else f"no dataset in {idx.parent} starts with that name"
    )
    raise IndexedDatasetError(
        f"{prefix}: no such dataset ({idx.name} and {bin_.name} are missing); "
        f"Megatron takes the prefix without .bin/.idx; {advice}"
    )


def _read_header(idx: Path) -> tuple[np.dtype, int, int]:
    """Return the token dtype and the numbers of sequences and of document index entries."""
    size = idx.stat().st_size
    with idx.open("rb") as stream:
        header = stream.read(HEADER.size)
    if not header.startswith(MAGIC[: len(header)]):
        raise IndexedDatasetError(
            f"{idx}: not an indexed dataset: it starts with {header[: len(MAGIC)]!r}, not {MAGIC!r}; "
            f"preprocess the corpus with tools/preprocess_data.py"
        )
    if len(header) < HEADER.size:
        raise IndexedDatasetError(
            f"{idx}: truncated: {size} bytes, but the header alone needs {HEADER.size}; "
            f"copy or preprocess the dataset again"
        )
    _, version, code, sequences, documents = HEADER.unpack(header)
    if version != VERSION:
        raise IndexedDatasetError(
            f"{idx}: unsupported version {version}, only {VERSION} can be read; preprocess the corpus again"
        )
    if code not in DTYPES:
        raise IndexedDatasetError(
            f"{idx}: unknown dtype code {code}, known are 1 to {max(DTYPES)}; "
            f"copy or preprocess the dataset again"
        )
    needed = HEADER.size + 12 * sequences + 8 * documents
    if size not in (needed, needed + sequences):
        raise IndexedDatasetError(
            f"{idx}: {'truncated' if size < needed else 'too long'}: {size} bytes, but its header, "
            f"with {sequences} sequences and {documents} document index entries, needs {needed}; "
            f"copy or preprocess the dataset again"
        )
    return DTYPES[code], sequences, documents
