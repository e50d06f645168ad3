"""Documents: the texts of one line, row or file, or what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

import orjson

__all__ = [
    "BadDocument",
    "Content",
    "Document",
    "Oversized",
    "Place",
    "PlainText",
    "RawDocument",
    "parse",
    "readable",
    "size_of",
    "text_size",
]

Value = str | list[str]


_SEVERAL = 20
"""Keys of a document that an error names: it stands in the journal, once for each bad document."""


class Place(NamedTuple):
    """Where a document is.

    Parameters
    ----------
    path
        The input file.
    offset
        Byte at which the document begins, in the decompressed file; None in Parquet.
    number
        Its line, row or file, from 1; None where it is not known yet.
    """

    path: str
    offset: int | None
    number: int | None

    def __str__(self) -> str:
        name = self.path if self.number is None else f"{self.path}:{self.number}"
        return name if self.offset is None else f"{name}: byte {self.offset}"


@dataclass(frozen=True)
class Oversized:
    """A document that was too large to be read.

    Parameters
    ----------
    bytes
        Its size.
    limit
        The largest size.
    """

    bytes: int
    limit: int


@dataclass(frozen=True)
class PlainText:
    """A document that is not JSON.

    Parameters
    ----------
    data
        Its UTF-8.
    """

    data: bytes


Content = bytes | PlainText | Mapping[str, object] | Oversized
"""A line of JSON, a plain text, the values of a row, or what could not be read."""


class RawDocument(NamedTuple):
    """A document as it was read, and where."""

    place: Place
    content: Content


class Document(NamedTuple):
    """The texts of a document, or lists of texts, in the order of the keys.

    Parameters
    ----------
    place
        Where it is.
    values
        One value for each key.
    content
        The document as it was read.
    """

    place: Place
    values: tuple[Value, ...]
    content: Content


@dataclass(frozen=True)
class BadDocument:
    """A document that cannot be encoded.

    Parameters
    ----------
    place
        Where it is.
    kind
        What is wrong, in a few words; what the summary counts.
    reason
        What is wrong, precisely, and what to do.
    content
        The document as it was read, None if it was too large.
    """

    place: Place
    kind: str
    reason: str
    content: str | None

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"

    def on_line(self, number: int) -> BadDocument:
        """Return the same, with its line."""
        return replace(self, place=self.place._replace(number=number))


def parse(raw: RawDocument, keys: Sequence[str]) -> Document | BadDocument:
    """Return the texts that ``raw`` has under each key, or what is wrong with it."""
    place, content = raw
    if type(content) is bytes:  # a line of JSON: the fast way, for a document with a string under each key
        try:
            values = orjson.loads(content)
            texts = tuple(values[key] for key in keys)
            if all(type(text) is str for text in texts):
                return Document(place, texts, content)
        except (orjson.JSONDecodeError, KeyError, TypeError):
            pass  # json accepts more than orjson, and says where it stops
    try:
        return Document(place, _values(content, keys), content)
    except _WrongError as wrong:
        return BadDocument(place, wrong.kind, wrong.reason, readable(content))


class _WrongError(Exception):
    def __init__(self, kind: str, reason: str) -> None:
        self.kind, self.reason = kind, reason


def size_of(raw: RawDocument) -> int:
    """Return the size of a document as it was read: bytes, or in a table characters."""
    content = raw.content
    if isinstance(content, bytes):
        return len(content)
    if isinstance(content, PlainText):
        return len(content.data)
    if isinstance(content, Oversized):
        return content.bytes
    return sum(map(text_size, content.values()))


def text_size(value: object) -> int:
    """Return the length of a text or of a list of texts; 0 for anything else."""
    if isinstance(value, list):
        return sum(map(text_size, value))
    return len(value) if isinstance(value, str) else 0


def _values(content: Content, keys: Sequence[str]) -> tuple[Value, ...]:
    if isinstance(content, Oversized):
        raise _WrongError(
            "too large",
            f"a document of {content.bytes} bytes; at most {content.limit} are read at once: split it, "
            f"or raise --max-document-bytes",
        )
    if isinstance(content, PlainText):
        return (_decode(content.data, "file"),)
    document = _load(content, keys[0]) if isinstance(content, bytes) else content
    return tuple(_value(document, key) for key in keys)


def _load(line: bytes, example: str) -> Mapping[str, object]:
    if not line.strip():
        raise _WrongError("empty line", "empty line; each line must be a JSON object: remove it")
    try:
        # Without the line end an error at the end of the line has the right column.
        document = json.loads(_decode(line.rstrip(b" \t\r\n"), "line"))
    except json.JSONDecodeError as error:
        raise _WrongError("malformed JSON", f"malformed JSON at column {error.colno}: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise _WrongError("malformed JSON", f"JSON that cannot be read: {error}") from error
    if not isinstance(document, dict):
        raise _WrongError(
            "not an object",
            f'{_json_type(document)}; each line must be a JSON object such as {{"{example}": "..."}}',
        )
    return document


def _decode(data: bytes, unit: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _WrongError(
            "not UTF-8", f"not UTF-8 at byte {error.start + 1} of the {unit}: {error.reason}"
        ) from error


def _value(document: Mapping[str, object], key: str) -> Value:
    if key not in document:
        there = ", ".join(map(repr, islice(document, _SEVERAL))) or "none"
        there += f" and {len(document) - _SEVERAL:,} more" if len(document) > _SEVERAL else ""
        raise _WrongError(
            "missing key", f"no key {key!r}; the keys there are: {there}; choose with --json-keys"
        )
    value = document[key]
    texts = value if isinstance(value, list) else [value]
    for text in texts:
        if isinstance(text, bytes):
            _decode(text, "value")
        if not isinstance(text, str):
            kind = f"{'a list with ' if isinstance(value, list) else ''}{_json_type(text)}"
            raise _WrongError(
                "not a string", f"key {key!r} has {kind}; it must be a string or a list of strings"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise _WrongError(
                "lone surrogate",
                f"key {key!r} has the lone surrogate \\u{ord(text[error.start]):04x} at character "
                f"{error.start + 1}, which is not a character; remove it or write \\ufffd instead",
            ) from error
    return value  # type: ignore[return-value]


def readable(content: Content) -> str | None:
    """Return a document as it was read; bytes that are not UTF-8 as ``surrogateescape`` has them."""
    if isinstance(content, Oversized):
        return None
    if isinstance(content, bytes | PlainText):
        data = content if isinstance(content, bytes) else content.data
        return data.decode("utf-8", "surrogateescape")
    return json.dumps(content, default=lambda value: value.decode("utf-8", "surrogateescape"))


def _json_type(value: object) -> str:
    if value is None:
        return "null"
    names: dict[type, str] = {bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")
