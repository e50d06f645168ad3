"""What is in the file of a SentencePiece model, read without its library's protobuf.

The module for it in sentencepiece, and transformers' copies, describe one file name: whichever is imported
second in a process fails (transformers 5.23, sentencepiece 0.2.3, protobuf 7.36).

Source: sentencepiece_model.proto (google/sentencepiece, v0.2.1).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

__all__ = ["Kind", "Piece", "SentencePieceModel"]

_MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


class Kind(IntEnum):
    """What a piece is."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Piece:
    """An entry of the vocabulary, whose id is its place in it."""

    text: str
    score: float
    kind: Kind


@dataclass(frozen=True, kw_only=True)
class SentencePieceModel:
    """A SentencePiece model.

    Parameters
    ----------
    content
        The file's.
    pieces
        The vocabulary.
    model_type
        ``unigram``, ``bpe``, ``word`` or ``char``.
    byte_fallback
        Whether characters that no piece has become the pieces of their bytes.
    space_is_suffix
        Whether the dummy space stands behind the text.
    rule
        The name of the normalization rule.
    characters
        What the rule does, as a trie and texts; empty where it changes nothing.
    dummy_prefix, remove_extra_spaces, escape_spaces
        What else normalization does.
    changes_ids_back
        Whether a denormalization rule is there, which decoding would need.
    """

    content: bytes
    pieces: list[Piece]
    model_type: str
    byte_fallback: bool
    space_is_suffix: bool
    rule: str
    characters: bytes
    dummy_prefix: bool
    remove_extra_spaces: bool
    escape_spaces: bool
    changes_ids_back: bool

    @classmethod
    def read(cls, content: bytes) -> SentencePieceModel:
        """Read a model.

        Raises
        ------
        ValueError
            If it is none.
        """
        try:
            fields = list(_fields(content))
            pieces = [_piece(dict(_fields(value))) for number, value in fields if number == 1]
            trainer, normalizer, denormalizer = (
                dict(_fields(b"".join(value for number, value in fields if number == wanted)))
                for wanted in (2, 3, 5)
            )
            return cls(
                content=content,
                pieces=pieces,
                model_type=_MODEL_TYPES[trainer.get(3, 1)],
                byte_fallback=bool(trainer.get(35, 0)),
                space_is_suffix=bool(trainer.get(24, 0)),
                rule=normalizer.get(1, b"").decode(),
                characters=normalizer.get(2, b""),
                dummy_prefix=bool(normalizer.get(3, 1)),
                remove_extra_spaces=bool(normalizer.get(4, 1)),
                escape_spaces=bool(normalizer.get(5, 1)),
                changes_ids_back=bool(denormalizer.get(2, b"")),
            )
        except (IndexError, KeyError, TypeError, AttributeError, struct.error, UnicodeDecodeError) as error:
            raise ValueError(f"not a SentencePiece model: {error}") from error

    def texts(self, *kinds: Kind) -> list[str]:
        """Return the texts of the pieces of these kinds."""
        return [piece.text for piece in self.pieces if piece.kind in kinds]


def _piece(fields: dict[int, Any]) -> Piece:
    (score,) = struct.unpack("<f", fields.get(2, bytes(4)))
    return Piece(fields.get(1, b"").decode(), score, Kind(fields.get(3, 1)))


def _fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """Yield the number and the value of each field of a protobuf message."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        match key & 7:
            case 0:
                value, at = _varint(content, at)
                yield key >> 3, value
                continue
            case 1:
                size = 8
            case 2:
                size, at = _varint(content, at)
            case 5:
                size = 4
            case other:
                raise ValueError(f"not a SentencePiece model: protobuf has no wire type {other}")
        if at + size > len(content):
            raise ValueError("not a SentencePiece model: it ends early")
        yield key >> 3, content[at : at + size]
        at += size


def _varint(content: bytes, at: int) -> tuple[int, int]:
    result = shift = 0
    while True:
        byte = content[at]
        at += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, at
        shift += 7
