"""From a chunk of input to tokens: what a worker process does."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_periln.data.readers.documents import BadDocument, Document, parse, readable, size_of
from megatron_periln.data.readers.tasks import Task
from megatron_periln.data.tokenizers.encoders import BatchEncoder, Encoded, GuardedEncoder, TextTooLargeError
from megatron_periln.errors import PreprocessError, with_kind

__all__ = ["ChunkEncoder", "EncodedChunk", "Part", "Sample"]

_BATCH_BYTES = 4 << 20
_SAMPLED = 1 / 4096
"""Part of the characters that are checked."""
_LONG_DOCUMENT = 256
"""Tokens of a document, about, from which on it is copied by itself."""
_SAMPLE_CHARACTERS = 16 << 10
"""How many are checked to begin with, and of one text at most."""


class Part(NamedTuple):
    """Tokens of consecutive documents under one key.

    Parameters
    ----------
    tokens
        ``[tokens]``, in the dtype of the dataset.
    sequence_lengths
        ``[sequences]``, int32: tokens in each sequence.
    document_lengths
        ``[documents]``, int64: sequences in each document; 0 for an empty document.
    """

    tokens: NDArray[np.integer]
    sequence_lengths: NDArray[np.int32]
    document_lengths: NDArray[np.int64]

    @property
    def empty(self) -> int:
        """Number of documents without tokens."""
        return int((self.document_lengths == 0).sum())


class Sample(NamedTuple):
    """Some texts and what an encoder, by its name, gave for them: to be checked."""

    encoder: str
    texts: list[str]
    encoded: Encoded


@dataclass(frozen=True)
class EncodedChunk:
    """The documents of a chunk.

    Parameters
    ----------
    parts
        Their tokens, for each key; every key has the same documents.
    bytes
        Their size as they were read, decompressed.
    skipped
        Number of documents that were skipped, of each kind.
    bad
        Those documents, if they were asked for.
    samples
        What shall be checked of it.
    """

    parts: dict[str, Part]
    bytes: int
    skipped: dict[str, int]
    bad: list[BadDocument]
    samples: list[Sample]


class ChunkEncoder:
    """Encodes documents as Megatron-LM's ``Encoder`` does (tools/preprocess_data.py).

    Parameters
    ----------
    encoder
        Turns texts into token ids.
    keys
        The keys to encode.
    dtype
        The dtype of the tokens.
    guarded
        The part of ``encoder`` that leaves some texts to another one, if there is any.
    sampled
        Whether to take samples, to be checked.
    eod
        Ends each document that is not empty, unless None.
    split
        Splits a text into sentences; without it each text is one sequence.
    stop
        Leave the rest of a chunk after its first bad document.
    keep_bad
        Keep bad documents, not only their numbers.
    limit
        Largest document to read, in bytes.
    """

    def __init__(
        self,
        encoder: BatchEncoder,
        keys: Sequence[str],
        dtype: np.dtype,
        *,
        guarded: GuardedEncoder | None = None,
        sampled: bool = False,
        eod: int | None = None,
        split: Callable[[str], list[str]] | None = None,
        stop: bool = True,
        keep_bad: bool = True,
        limit: int = 1 << 28,
    ) -> None:
        self.keys = list(dict.fromkeys(keys))
        self.dtype = dtype
        self.guarded = guarded
        self._encoder, self._sampled = encoder, sampled
        self._eod, self._split = eod, split
        self._stop, self._keep_bad, self._limit = stop, keep_bad, limit
        self._largest_id = int(np.iinfo(dtype).max)
        self._to_sample = float(_SAMPLE_CHARACTERS)
        self._random = random.Random(0)
        if eod is not None and eod > self._largest_id:
            raise PreprocessError(
                f"--append-eod: end-of-document token {eod} does not fit {dtype}, the dtype for the "
                f"tokenizer's vocabulary; check its size"
            )

    def encode(self, task: Task) -> EncodedChunk:
        """Encode the documents of ``task``.

        Raises
        ------
        PreprocessError
            If the input cannot be read.
        """
        parts: dict[str, list[Part]] = {key: [] for key in self.keys}
        bad: list[BadDocument] = []
        skipped = Counter[str]()
        samples: list[Sample] = []
        size = 0
        for batch, read in self._batches(task):
            good = [item for item in batch if isinstance(item, Document)]
            size += read
            samples += self._samples(good)
            try:
                encoded = [self._encode_documents(good)]
            except _CannotEncodeError:  # of one of them: each by itself tells which
                batch = [self._checked(item) for item in batch]
                encoded = [self._encode_documents([item]) for item in batch if isinstance(item, Document)]
            wrong = [item for item in batch if isinstance(item, BadDocument)]
            skipped.update(item.kind for item in wrong)
            bad += wrong if self._keep_bad else []
            for found in encoded:
                for key, part in zip(self.keys, found, strict=True):
                    parts[key].append(part)
        joined = {key: _joined(found, self.dtype) for key, found in parts.items()}
        return EncodedChunk(joined, size, dict(skipped), bad, samples)

    def _batches(self, task: Task) -> Iterator[tuple[list[Document | BadDocument], int]]:
        """Yield some documents at a time, and their size as they were read."""
        batch: list[Document | BadDocument] = []
        size = 0
        for raw in islice(task.chunk.raw_documents(self._limit), task.skip, None, task.step):
            batch.append(parse(raw, self.keys))
            size += size_of(raw)
            if self._stop and isinstance(batch[-1], BadDocument):
                break
            if size >= _BATCH_BYTES:
                yield batch, size
                batch, size = [], 0
        if batch:
            yield batch, size

    def _encode_documents(self, documents: Sequence[Document]) -> list[Part]:
        """Return the tokens under each key."""
        return [
            self._encode_values(key, [d.values[at] for d in documents]) for at, key in enumerate(self.keys)
        ]

    def _encode_values(self, key: str, values: Sequence[str | list[str]]) -> Part:
        sentences = [self._sentences(key, value) for value in values]
        counts = np.fromiter(map(len, sentences), np.int64, len(sentences))
        ids, lengths = self._tokenize(key, list(chain.from_iterable(sentences)))
        # As in Megatron-LM, sequences without tokens are dropped; a document may have none left.
        documents = np.repeat(np.arange(len(values)), counts)[lengths > 0]
        sequences = np.bincount(documents, minlength=len(values))
        lengths = lengths[lengths > 0]
        if self._eod is not None:  # behind the last sequence of each document that has one
            last = np.cumsum(sequences)[sequences > 0] - 1
            ids = _with_ends(ids, np.cumsum(lengths)[last], self._eod)
            lengths[last] += 1
        return Part(ids, lengths.astype(np.int32), sequences.astype(np.int64))

    def _sentences(self, key: str, value: str | list[str]) -> list[str]:
        if self._split is None:
            return [value] if isinstance(value, str) else value
        if isinstance(value, list):
            raise _CannotEncodeError(
                "not a string", f"key {key!r} has a list; with --split-sentences it must be a string"
            )
        return self._split(value)

    def _tokenize(self, key: str, texts: list[str]) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
        try:
            ids, lengths = self._encoder.encode(texts)
        except TextTooLargeError as error:
            raise _CannotEncodeError("too large", f"key {key!r} has {error}") from error
        except BaseException as error:  # a panic in a tokenizer written in Rust is no Exception
            raise _CannotEncodeError(
                "not tokenizable", f"key {key!r} cannot be tokenized: {with_kind(error)}"
            ) from error
        if ids.size and (largest := int(ids.max())) > self._largest_id:
            raise _CannotEncodeError(
                "token id",
                f"key {key!r} has token id {largest}, which does not fit {self.dtype}, the dtype for the "
                f"tokenizer's vocabulary; check its size",
            )
        same_size = ids.itemsize == self.dtype.itemsize
        return (ids.view(self.dtype) if same_size else ids.astype(self.dtype)), lengths

    def _checked(self, item: Document | BadDocument) -> Document | BadDocument:
        """Return a document that cannot be encoded as a bad one."""
        if isinstance(item, Document):
            try:
                self._encode_documents([item])
            except _CannotEncodeError as wrong:
                return BadDocument(item.place, wrong.kind, wrong.reason, readable(item.content))
        return item

    def _samples(self, documents: Sequence[Document]) -> list[Sample]:
        """Return a sample of the documents, none if enough were taken before."""
        if not self._sampled:
            return []
        self._to_sample += _SAMPLED * sum(map(_characters, documents))
        if self._to_sample <= 0:
            return []
        sample = list[str]()
        for document in self._random.sample(documents, len(documents)):
            if self._to_sample <= 0:
                break
            for value in document.values:  # of each key one text at least
                for text in [value] if isinstance(value, str) else value:
                    sample.append(text[:_SAMPLE_CHARACTERS])
                    self._to_sample -= len(sample[-1])
                    if self._to_sample <= 0:
                        break
        try:
            return [Sample(self._encoder.name, sample, self._encoder.encode(sample))] if sample else []
        except BaseException:  # that of a document that cannot be tokenized, which is found again below
            return []


class _CannotEncodeError(Exception):
    def __init__(self, kind: str, reason: str) -> None:
        self.kind, self.reason = kind, reason


def _characters(document: Document) -> int:
    return sum(len(value) if isinstance(value, str) else sum(map(len, value)) for value in document.values)


def _with_ends(ids: NDArray[np.integer], ends: NDArray[np.int64], eod: int) -> NDArray[np.integer]:
    """Return the ids with ``eod`` at each of these places, as ``np.insert`` does."""
    if len(ids) < _LONG_DOCUMENT * len(ends):
        return np.insert(ids, ends, eod)
    # Of long documents copying one after the other takes a third of the time.
    found = np.empty(len(ids) + len(ends), ids.dtype)
    start = 0
    for number, end in enumerate(ends.tolist()):
        found[start + number : end + number] = ids[start:end]
        found[end + number] = eod
        start = end
    found[start + len(ends) :] = ids[start:]
    return found


def _joined(parts: Sequence[Part], dtype: np.dtype) -> Part:
    if len(parts) == 1:
        return parts[0]
    empty = Part(np.empty(0, dtype), np.empty(0, np.int32), np.empty(0, np.int64))  # gives the dtypes
    names = ("tokens", "sequence_lengths", "document_lengths")
    return Part(*(np.concatenate([getattr(part, name) for part in (empty, *parts)]) for name in names))
