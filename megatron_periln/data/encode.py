"""From lines of JSON to tokens: what a worker process does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_periln.data.documents import Line, parse_line
from megatron_periln.data.errors import PreprocessError
from megatron_periln.data.tokenizer import Tokenizer, end_of_document
from megatron_periln.data.writer import EncodedDocuments

__all__ = ["EncodedChunk", "Encoder"]


@dataclass(frozen=True)
class EncodedChunk:
    """The documents of a list of lines.

    Parameters
    ----------
    lines
        Number of lines, which is the number of documents under each key.
    bytes
        Size of the lines.
    documents
        The tokens under each key.
    """

    lines: int
    bytes: int
    documents: dict[str, EncodedDocuments]


class Encoder:
    """Encodes documents as Megatron-LM's ``Encoder`` does (tools/preprocess_data.py).

    Parameters
    ----------
    tokenizer
        Megatron's tokenizer.
    keys
        The JSON keys to encode.
    dtype
        The dtype of the tokens.
    append_eod
        End each document that is not empty with the end-of-document token.
    split
        Splits a text into sentences; without it each text is one sequence.

    Raises
    ------
    PreprocessError
        If ``append_eod`` and the tokenizer has no end-of-document token that fits ``dtype``.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        keys: Sequence[str],
        dtype: np.dtype,
        *,
        append_eod: bool = False,
        split: Callable[[str], list[str]] | None = None,
    ) -> None:
        self.keys = list(dict.fromkeys(keys))
        self.dtype = dtype
        self._tokenizer = tokenizer
        self._eod = end_of_document(tokenizer) if append_eod else None
        self._split = split
        self._largest_id = int(np.iinfo(dtype).max)
        if self._eod is not None and self._eod > self._largest_id:
            raise PreprocessError(
                f"--append-eod: end-of-document token {self._eod} does not fit {dtype}, the dtype for a "
                f"vocabulary of {tokenizer.vocab_size}; check the tokenizer's vocabulary size"
            )

    def encode(self, lines: Sequence[Line]) -> EncodedChunk:
        """Encode the documents on ``lines``.

        Raises
        ------
        PreprocessError
            If a line cannot be parsed or its text cannot be tokenized.
        """
        parsed = [parse_line(line, self.keys) for line in lines]
        return EncodedChunk(
            lines=len(lines),
            bytes=sum(len(line.content) for line in lines),
            documents={
                key: self._encode_key(lines, key, [texts[key] for texts in parsed]) for key in self.keys
            },
        )

    def _encode_key(self, lines: Sequence[Line], key: str, texts: list[str | list[str]]) -> EncodedDocuments:
        tokens: list[int] = []
        sequence_lengths: list[int] = []
        document_lengths: list[int] = []
        for line, text in zip(lines, texts, strict=True):
            before = len(sequence_lengths)
            for sentence in self._sentences(line, key, text):
                ids = self._tokenize(line, key, sentence)
                if ids:
                    tokens.extend(ids)
                    sequence_lengths.append(len(ids))
            if self._eod is not None and len(sequence_lengths) > before:
                tokens.append(self._eod)
                sequence_lengths[-1] += 1
            document_lengths.append(len(sequence_lengths) - before)
        return EncodedDocuments(
            tokens=np.array(tokens, dtype=self.dtype),
            sequence_lengths=np.array(sequence_lengths, dtype=np.int32),
            document_lengths=np.array(document_lengths, dtype=np.int64),
        )

    def _sentences(self, line: Line, key: str, text: str | list[str]) -> list[str]:
        if self._split is None:
            return [text] if isinstance(text, str) else text
        if isinstance(text, list):
            raise PreprocessError(
                f"{line.where}: key {key!r} has a list; with --split-sentences it must be a string"
            )
        return self._split(text)

    def _tokenize(self, line: Line, key: str, text: str) -> list[int]:
        try:
            ids = list(self._tokenizer.tokenize(text))
        except BaseException as error:  # a panic in a tokenizer written in Rust is no Exception
            surrogate = next(
                (at for at, character in enumerate(text) if "\ud800" <= character <= "\udfff"), None
            )
            if surrogate is None:
                reason = " ".join(f"{type(error).__name__}: {error}".split())
            else:
                reason = (
                    f"lone surrogate \\u{ord(text[surrogate]):04x} at character {surrogate + 1}, which "
                    f"is not a character; remove it or write \\ufffd instead"
                )
            raise PreprocessError(f"{line.where}: key {key!r} cannot be tokenized: {reason}") from error
        if ids and not 0 <= min(ids) <= max(ids) <= self._largest_id:
            raise PreprocessError(
                f"{line.where}: key {key!r} has token id {max(ids, key=abs)}, which does not fit "
                f"{self.dtype}, the dtype for a vocabulary of {self._tokenizer.vocab_size}; "
                f"check the tokenizer's vocabulary size"
            )
        return ids
