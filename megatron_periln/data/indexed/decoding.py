"""Documents of an indexed dataset as text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_periln.data.indexed.format import blocks
from megatron_periln.data.indexed.index_arrays import IndexArrays
from megatron_periln.errors import PreprocessError

__all__ = ["DecodedDocument", "Detokenizer", "decode_documents"]


class Detokenizer(Protocol):
    """What decoding uses of Megatron's tokenizers."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""

    def detokenize(self, ids: list[int]) -> str:
        """Return the text of ``ids``."""


@dataclass(frozen=True)
class DecodedDocument:
    """A document, or the start of it: its number, its length in tokens, ids and their text."""

    document: int
    tokens: int
    ids: list[int]
    text: str


def decode_documents(
    dataset: IndexArrays, tokenizer: Detokenizer, number: int, most_tokens: int = 64
) -> Iterator[DecodedDocument]:
    """Decode the starts of documents spread evenly over a dataset, the first and the last among them.

    Parameters
    ----------
    dataset
        The dataset.
    tokenizer
        Megatron's tokenizer.
    number
        How many documents.
    most_tokens
        How many tokens of each.

    Raises
    ------
    PreprocessError
        If a token is not in the tokenizer's vocabulary.
    """
    tokens = np.memmap(dataset.bin, dtype=dataset.info.dtype, mode="r")
    documents = np.linspace(0, dataset.info.documents - 1, min(number, dataset.info.documents))
    for document in documents.round().astype(np.int64).tolist():
        start, end = (int(place) for place in dataset.document_ends[document : document + 2])
        ids: list[int] = []
        for sequence in range(start, end):
            if len(ids) >= most_tokens:
                break
            first = int(dataset.pointers[sequence]) // dataset.info.dtype.itemsize
            length = min(int(dataset.lengths[sequence]), most_tokens - len(ids))
            ids += tokens[first : first + length].tolist()
        wrong = [token for token in ids if not 0 <= token < tokenizer.vocab_size]
        if wrong:
            raise PreprocessError(
                f"{dataset.bin}: document {document} holds token {wrong[0]}, but the tokenizer has "
                f"{tokenizer.vocab_size}: use the one that it was made with"
            )
        length = sum(int(block.sum(dtype=np.int64)) for block in blocks(dataset.lengths[start:end]))
        yield DecodedDocument(document, length, ids, tokenizer.detokenize(ids))
