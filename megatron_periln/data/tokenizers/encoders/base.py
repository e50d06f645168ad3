"""What every encoder of batches does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["BatchEncoder", "Encoded", "EncoderUnavailableError", "join", "token_dtype"]

Encoded = tuple[NDArray[np.uint32], NDArray[np.int64]]
"""The token ids of all texts, one after the other, and the number of ids of each text."""


class EncoderUnavailableError(Exception):
    """Why an encoder cannot serve a tokenizer."""


class BatchEncoder(Protocol):
    """Turns texts into token ids."""

    name: str

    def load(self) -> None:
        """Do now what the first call of `encode` would do first; before a fork, for example.

        Raises
        ------
        EncoderUnavailableError
            If the library is missing or cannot read the tokenizer.
        """

    def encode(self, texts: list[str]) -> Encoded:
        """Return the token ids of ``texts``, which hold no lone surrogates."""


def join(rows: Iterable[NDArray]) -> Encoded:
    """Return rows of ids as one array, and their lengths."""
    rows = [np.asarray(row).astype(np.uint32, copy=False) for row in rows]
    lengths = np.fromiter((len(row) for row in rows), np.int64, len(rows))
    return np.concatenate(rows) if rows else np.empty(0, np.uint32), lengths


def token_dtype(vocab_size: int | None) -> np.dtype:
    """Return the dtype of a dataset's tokens.

    Source: ``DType.optimal_dtype`` (megatron/core/datasets/indexed_dataset.py).
    """
    return np.dtype(np.uint16 if vocab_size is not None and vocab_size < 65500 else np.int32)
