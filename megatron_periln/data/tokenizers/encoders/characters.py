"""Characters that two implementations of a tokenizer take for different kinds of characters.

Tokenizers split texts at letters, digits, punctuation and white space, as the Unicode tables of their
libraries know them; and those are of different Unicode versions. Token ids rarely show it: here the
tokenizer gets a vocabulary in which they always do. The same with normalization (NFC), which puts marks in an
order and composes them with what they stand on: tokenizers 0.23 does so by the table of Unicode 9.
"""

from __future__ import annotations

import base64
import json
import unicodedata
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np

from megatron_periln.data.tokenizers.encoders.base import BatchEncoder, Encoded
from megatron_periln.data.tokenizers.resolved_tokenizer import ResolvedTokenizer

__all__ = [
    "ASSIGNABLE",
    "GuardedEncoder",
    "byte_names",
    "differing_characters",
    "differing_marks",
    "unknown_characters",
    "with_normalization_alone",
    "with_telling_vocabulary",
]

_MARKS = b"\"aA1 \n'"
ASSIGNABLE = (range(0x80, 0xD800), range(0xE000, 0x40000), range(0xE0000, 0xE1000))
"""Code points beyond ASCII that Unicode has assigned or may assign: what is compared."""
_UNASSIGNED = (0x50000, 0xF0000, 0x100000, 0x10FFFF)
_BATCH = 1 << 14
_FIRST_MARK, _LAST_MARK = "\u0334", "\u0345"
"""Marks of the lowest and of the highest class: in an order, they stand before and behind all others."""
_TOGETHER = 64


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
        self._points = np.zeros(1 << 21, bool)
        self._points[characters] = True
        self._units = self._points[: 1 << 16].copy()  # of UTF-16; and what may be the first half of one
        for point in characters:
            if point >= 1 << 16:
                self._units[0xD800 + (point - (1 << 16) >> 10)] = True
        self._first = int(np.argmax(self._units))

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
        candidates = units[units >= self._first]  # few or none of most texts
        if not self._units[candidates].any():
            return False
        if candidates.max() < 0xD800:
            return True
        return bool(self._points[np.frombuffer(text.encode("utf-32-le"), np.uint32)].any())


def differing_characters(fast: BatchEncoder, exact: BatchEncoder) -> list[int]:
    """Return the code points that two encoders with a telling vocabulary split differently."""
    points = [point for part in ASSIGNABLE for point in part] + list(_UNASSIGNED)
    differing: list[int] = []
    for start in range(0, len(points), _BATCH):
        part = points[start : start + _BATCH]
        marks = _MARKS.decode()
        texts = ["".join(chr(point) + mark for mark in marks) + chr(point) * 2 for point in part]
        differing += _differing(fast, exact, part, texts)
    return differing


def differing_marks(fast: BatchEncoder, exact: BatchEncoder) -> list[int]:
    """Return the code points that two encoders normalize differently: give one an order, or compose it.

    Parameters
    ----------
    fast, exact
        Encoders of one tokenizer, as `with_normalization_alone` returns it.
    """
    known = [point for part in ASSIGNABLE for point in part if not 0x20000 <= point < 0xE0000]
    pairs = (unicodedata.decomposition(chr(point)).split() for point in known)
    composed = [
        (int(pair[0], 16), int(pair[1], 16)) for pair in pairs if len(pair) == 2 and pair[0][0] != "<"
    ]
    units = [(point, text) for point in known for text in _with_other_marks(chr(point))]
    units += [(second, f"a{chr(first)}{chr(second)}") for first, second in composed]
    differing: set[int] = set()
    for start in range(0, len(units), _BATCH):
        groups = [units[at : at + _TOGETHER] for at in range(start, start + _BATCH, _TOGETHER)]
        suspects = _differing(fast, exact, groups, ["".join(text for _, text in group) for group in groups])
        alone = [unit for group in suspects for unit in group]
        differing.update(point for point, _ in _differing(fast, exact, alone, [text for _, text in alone]))
    return sorted(differing)


def _with_other_marks(character: str) -> tuple[str, str]:
    return f"a{character}{_FIRST_MARK}", f"a{_LAST_MARK}{character}"


def _differing[Item](
    fast: BatchEncoder, exact: BatchEncoder, items: list[Item], texts: list[str]
) -> list[Item]:
    """Return those of the items whose texts two encoders give different ids."""
    (ids, lengths), (expected, expected_lengths) = fast.encode(texts), exact.encode(texts)
    if np.array_equal(ids, expected) and np.array_equal(lengths, expected_lengths):
        return []
    ours = np.split(ids, np.cumsum(lengths)[:-1])
    theirs = np.split(expected, np.cumsum(expected_lengths)[:-1])
    rows = zip(items, ours, theirs, strict=True)
    return [item for item, left, right in rows if not np.array_equal(left, right)]


def unknown_characters() -> list[int]:
    """Return the code points that this Python's table lacks: newer ones may compose, unknown with what."""
    return [point for point in range(0x80, 0x20000) if unicodedata.category(chr(point)) == "Cn"]


def with_normalization_alone(resolved: ResolvedTokenizer) -> ResolvedTokenizer | None:
    """Return a tokenizer that gives the bytes of normalized texts; None for one that does not normalize."""
    if resolved.kind != "tokenizers" or b'"NFC"' not in resolved.payload:
        return None
    content: dict[str, Any] = {
        **dict.fromkeys(("truncation", "padding", "post_processor", "decoder")),
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            **{"type": "ByteLevel", "add_prefix_space": False},
            **{"trim_offsets": True, "use_regex": True},
        },
        "model": {
            **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")),
            **dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False),
            "type": "BPE",
            "vocab": {name: byte for byte, name in enumerate(byte_names())},
            "merges": [],
        },
    }
    settings = {**resolved.settings, "add_special_tokens": False, "unsupported": None}
    return replace(resolved, payload=json.dumps(content).encode(), settings=settings)


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
    names = byte_names()
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


def byte_names() -> list[str]:
    """Return the characters by which byte-level BPE writes bytes: printable ones stand for themselves."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in shown else next(others)) for byte in range(256)]
