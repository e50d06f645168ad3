"""Characters that two implementations of a tokenizer take for different kinds of characters.

Tokenizers split texts at letters, digits, punctuation and white space, as the Unicode tables of their
libraries know them; and those are of different Unicode versions. Token ids rarely show it: here the
tokenizer gets a vocabulary in which they always do.
"""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from itertools import product

import numpy as np

from megatron_periln.data.tokenizers.encoders.base import BatchEncoder, Encoded
from megatron_periln.data.tokenizers.resolved_tokenizer import ResolvedTokenizer

__all__ = ["ASSIGNABLE", "GuardedEncoder", "differing_characters", "with_telling_vocabulary"]

_MARKS = b"\"aA1 \n'"
ASSIGNABLE = (range(0x80, 0xD800), range(0xE000, 0x40000), range(0xE0000, 0xE1000))
"""Code points beyond ASCII that Unicode has assigned or may assign: what is compared."""
_UNASSIGNED = (0x50000, 0xF0000, 0x100000, 0x10FFFF)
_BATCH = 1 << 14


class GuardedEncoder:
    """A fast encoder, but for texts with characters that it takes for something else.

    Parameters
    ----------
    fast
        Encodes the other texts.
    exact
        Encodes texts with such characters.
    characters
        Their code points.
    """

    def __init__(self, fast: BatchEncoder, exact: BatchEncoder, characters: list[int]) -> None:
        self.name = fast.name
        self.exact = exact
        self._fast = fast
        self._characters = frozenset(map(chr, characters))
        self._units = np.zeros(1 << 16, bool)  # of UTF-16: the characters, or what may be half of one
        for point in characters:
            self._units[point if point < 1 << 16 else 0xD800 + (point - (1 << 16) >> 10)] = True

    def load(self) -> None:
        """Load the fast encoder; the other is loaded where it is needed."""
        self._fast.load()

    def encode(self, texts: list[str]) -> Encoded:
        """Return the token ids of ``texts``."""
        special = [at for at, text in enumerate(texts) if not text.isascii() and self._has_any(text)]
        if not special:
            return self._fast.encode(texts)
        left = set(special)
        rows: list[np.ndarray] = [np.empty(0, np.uint32)] * len(texts)
        for encoder, places in (
            (self._fast, [at for at in range(len(texts)) if at not in left]),
            (self.exact, special),
        ):
            ids, lengths = encoder.encode([texts[at] for at in places])
            for at, end, length in zip(places, np.cumsum(lengths), lengths, strict=True):
                rows[at] = ids[end - length : end]
        return np.concatenate(rows), np.array([len(row) for row in rows], np.int64)

    def _has_any(self, text: str) -> bool:
        units = np.frombuffer(text.encode("utf-16-le"), np.uint16)
        return bool(self._units[units].any()) and not self._characters.isdisjoint(text)


def differing_characters(fast: BatchEncoder, exact: BatchEncoder) -> list[int]:
    """Return the code points that two encoders with a telling vocabulary split differently."""
    points = [point for part in ASSIGNABLE for point in part] + list(_UNASSIGNED)
    differing: list[int] = []
    for start in range(0, len(points), _BATCH):
        part = points[start : start + _BATCH]
        marks = _MARKS.decode()
        texts = ["".join(chr(point) + mark for mark in marks) + chr(point) * 2 for point in part]
        (ids, lengths), (expected, expected_lengths) = fast.encode(texts), exact.encode(texts)
        if np.array_equal(ids, expected) and np.array_equal(lengths, expected_lengths):
            continue
        ours = np.split(ids, np.cumsum(lengths)[:-1])
        theirs = np.split(expected, np.cumsum(expected_lengths)[:-1])
        rows = zip(part, ours, theirs, strict=True)
        differing += [point for point, left, right in rows if not np.array_equal(left, right)]
    return differing


def with_telling_vocabulary(resolved: ResolvedTokenizer) -> ResolvedTokenizer | None:
    """Return a tokenizer that splits texts like ``resolved``, whose ids tell where.

    A byte of a character and a neighbour become one token, unless the text is split between them.
    None for a tokenizer that splits texts regardless of kinds of characters.
    """
    pairs = [
        pair
        for byte, mark in product(range(0x80, 0x100), _MARKS)
        for pair in (bytes([byte, mark]), bytes([mark, byte]))
    ]
    if resolved.kind == "tiktoken":
        tokens = [*(bytes([byte]) for byte in range(256)), *pairs]
        ranks = (b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))
        return replace(
            resolved, payload=b"".join(ranks), settings={**resolved.settings, "special_tokens": []}
        )
    if resolved.kind != "tokenizers" or b'"ByteLevel"' not in resolved.payload:
        return None
    content = json.loads(resolved.payload)
    if content["model"]["type"] != "BPE":
        return None
    names = _byte_names()
    alphabet = {names[byte]: byte for byte in range(256)}
    merges = [[names[left], names[right]] for left, right in pairs]
    content["model"] |= {
        "vocab": alphabet | {left + right: 256 + rank for rank, (left, right) in enumerate(merges)},
        "merges": merges,
        "unk_token": None,
        "ignore_merges": False,
    }
    content |= {"added_tokens": [], "post_processor": None}
    settings = {**resolved.settings, "add_special_tokens": False}
    return replace(resolved, payload=json.dumps(content).encode(), settings=settings)


def _byte_names() -> list[str]:
    """Return the characters by which byte-level BPE writes bytes: printable ones stand for themselves."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in shown else next(others)) for byte in range(256)]
