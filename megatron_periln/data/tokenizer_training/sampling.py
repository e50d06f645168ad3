"""A bounded sample of the texts of a corpus."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from megatron_periln.data.readers.documents import BadDocument, parse
from megatron_periln.data.readers.inputs import InputFile
from megatron_periln.data.readers.opening import number_lines
from megatron_periln.data.readers.tasks import cut_into_sources
from megatron_periln.errors import PreprocessError

__all__ = ["TextSample", "read_texts", "take_sample"]

_PIECE = 1 << 14
_HELD_OUT = 50
_CHUNK_BYTES = 1 << 22
_LARGEST = 1 << 28
"""Size of the largest document that is read, in bytes."""


@dataclass(frozen=True)
class TextSample:
    """Pieces of text, in UTF-8.

    Parameters
    ----------
    train
        What to train on.
    held_out
        Every 50th piece; empty if there is but one.
    bytes_seen
        Size of the text that was read to take the sample.
    """

    train: list[bytes]
    held_out: list[bytes]
    bytes_seen: int


def read_texts(inputs: Sequence[InputFile], keys: Sequence[str]) -> Iterator[str]:
    """Yield the texts of the inputs in pieces of up to 16 Ki characters, which end where words or lines end.

    Parameters
    ----------
    inputs
        What ``find_inputs`` returns.
    keys
        The keys whose strings, or lists of strings, are the texts of a document.

    Raises
    ------
    PreprocessError
        If a file cannot be read, or a document has no such texts; it names the line.
    """
    sources = cut_into_sources(inputs, keys, _CHUNK_BYTES)
    for chunk in (chunk for source in sources for chunk in source.chunks(_LARGEST)):
        for raw in chunk.raw_documents(_LARGEST):
            document = parse(raw, keys)
            if isinstance(document, BadDocument):
                raise PreprocessError(str(next(number_lines(partial(list, [document])))))
            for value in document.values:
                for text in [value] if isinstance(value, str) else value:
                    yield from _cut(text)


def take_sample(texts: Iterable[str], most_bytes: int, *, seed: int | None) -> TextSample:
    """Take at most ``most_bytes`` bytes of the texts, and hold some out.

    Parameters
    ----------
    texts
        Pieces of text.
    most_bytes
        Size of the sample in UTF-8, and about the memory that it needs.
    seed
        Of a random sample, in which every piece is as likely as any other; it needs all texts.
        None takes the first pieces and reads no further.

    Raises
    ------
    PreprocessError
        If there is no text.
    """
    draw = random.Random(seed).random
    heap: list[tuple[float, int, bytes]] = []  # the piece with the highest number drawn is first
    limit, size, seen = 1.0, 0, 0
    for order, text in enumerate(texts):
        piece = text.encode("utf-8")
        number = draw() if seed is not None else 0.0
        seen += len(piece)
        if number >= limit:
            continue
        heapq.heappush(heap, (-number, order, piece))
        size += len(piece)
        if seed is None and size >= most_bytes:
            break
        while size > most_bytes and len(heap) > 1:
            highest, _, dropped = heapq.heappop(heap)
            limit, size = -highest, size - len(dropped)
    pieces = [piece for _, _, piece in sorted(heap, key=lambda entry: entry[1])]
    if not pieces:
        raise PreprocessError("--input: no text in these files")
    held_out = pieces[::_HELD_OUT] if len(pieces) > 1 else []
    train = [piece for place, piece in enumerate(pieces) if place % _HELD_OUT] if held_out else pieces
    return TextSample(train=train, held_out=held_out, bytes_seen=seen)


def _cut(text: str) -> Iterator[str]:
    """Yield pieces of a text, cut after a line end or before a space."""
    while len(text) > _PIECE:
        place = text.rfind("\n", 0, _PIECE) + 1
        if place <= 0:
            place = text.rfind(" ", 1, _PIECE)
        if place <= 0:
            place = _PIECE
        yield text[:place]
        text = text[place:]
    if text:
        yield text
