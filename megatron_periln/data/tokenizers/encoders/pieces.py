"""Long texts in pieces, so that memory does not grow with the longest text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megatron_periln.data.tokenizers.encoders.base import BatchEncoder, Encoded
from megatron_periln.data.tokenizers.encoders.characters import GuardedEncoder
from megatron_periln.data.tokenizers.encoders.cuts import Cuts, find_cuts
from megatron_periln.data.tokenizers.resolved_tokenizer import ResolvedTokenizer

__all__ = ["PiecewiseEncoder", "TextTooLargeError"]

_PIECE = 1 << 17
"""Characters of a piece; a text of no more is not cut."""
_AT_ONCE = 64 << 20
"""Memory that texts encoded at once may take, about."""
_PARTS = 16
_PROBED_AT_ONCE = 1 << 14
_MOST = 4 << 30
"""Memory that one text may take, about."""
_COST = {"gigatoken": 4, "tiktoken": 6, "sentencepiece": 40, "tokenizers": 170, "megatron": 200}
"""Bytes of memory for each byte of a text, measured with texts of 10 to 200 MB."""


class TextTooLargeError(Exception):
    """A text can't be cut, and is too large to be encoded at once."""


class PiecewiseEncoder:
    """Encodes long texts in pieces, cut where the ids can't change.

    Parameters
    ----------
    encoder
        Encodes the pieces.
    resolved
        Its tokenizer, which decides where texts may be cut.
    limited
        Whether to refuse texts that can't be cut and would take more memory than most machines have.
    """

    def __init__(self, encoder: BatchEncoder, resolved: ResolvedTokenizer, *, limited: bool = True) -> None:
        self.name = encoder.name
        self.limited = limited
        self._encoder, self._resolved = encoder, resolved
        works = encoder.exact if isinstance(encoder, GuardedEncoder) else encoder  # on all texts, if need be
        if isinstance(works, PiecewiseEncoder):
            works.limited = limited
        self._at_once = _AT_ONCE // _cost(works)
        self._added = self._put_around()

    def load(self) -> None:
        """Load the encoder."""
        self._encoder.load()

    def encode(self, texts: list[str]) -> Encoded:
        """Return the token ids of ``texts``.

        Raises
        ------
        TextTooLargeError
            If one can't be cut and is larger than the encoder's memory allows.
        """
        if sum(map(len, texts)) <= self._at_once and max(map(len, texts), default=0) <= _PIECE:
            return self._encoder.encode(texts)
        return self._encode([self._pieces(text) for text in texts], self._at_once)

    def _encode(self, pieces: list[list[str]], at_once: int) -> Encoded:
        """Return the ids of texts that are given as their pieces, some of which are encoded at once."""
        ids, lengths = zip(*map(self._encoder.encode, _batches(pieces, at_once)), strict=True)
        return self._joined(np.concatenate(ids), np.concatenate(lengths), list(map(len, pieces)))

    def _pieces(self, text: str) -> list[str]:
        if len(text) <= _PIECE:
            return [text]
        pieces = self._cuts.pieces(text, _PIECE) if self._cuts else [text]
        if self.limited:
            self._check(max(pieces, key=len), whole=len(pieces) == 1)
        return pieces

    def _check(self, piece: str, *, whole: bool) -> None:
        cost = _cost(self)
        if len(piece) <= _MOST // cost // 4:  # bytes of a character
            return
        size = len(piece) if piece.isascii() else len(piece.encode())
        if size > _MOST // cost:
            what = f"{size} bytes" if whole else f"{size} bytes without a place where it could be cut"
            reason = "" if self._cuts else ", whose words it isn't known how to find"
            raise TextTooLargeError(
                f"a text of {what}; the encoder {self.name} takes about {cost} bytes of memory for each byte "
                f"of it{reason}, so at most {_MOST // cost} are encoded: split it, or give "
                f"--max-document-bytes to encode it all the same"
            )

    @cached_property
    def _cuts(self) -> Cuts | None:
        """Where texts are cut; nowhere, if Megatron's ids for the probes are not those of their pieces."""
        cuts = find_cuts(self._resolved)
        if cuts is None or self._added is None:
            return None
        pieces = [cuts.pieces(text, len(text) // _PARTS) for text, _ in self._resolved.probes]
        ids, lengths = self._encode(pieces, _PROBED_AT_ONCE)
        expected = [token for _, tokens in self._resolved.probes for token in tokens]
        same = np.array_equal(lengths, [len(tokens) for _, tokens in self._resolved.probes])
        return cuts if same and np.array_equal(ids, expected) else None

    def _put_around(self) -> tuple[int, int] | None:
        """Return the number of ids before and behind every text; None if that is not all that is added."""
        if not self._resolved.settings.get("add_special_tokens"):
            return 0, 0
        template = self._resolved.settings.get("template")
        return (len(template[0]), len(template[1])) if template else None

    def _joined(self, ids: NDArray[np.uint32], lengths: NDArray[np.int64], pieces: list[int]) -> Encoded:
        """Return the ids of texts from those of their pieces, of which each text has so many."""
        counts = np.array(pieces, np.int64)
        ends = np.cumsum(counts)
        before, behind = self._added or (0, 0)
        if before or behind:
            first, last = np.zeros(len(lengths), bool), np.zeros(len(lengths), bool)
            first[ends - counts], last[ends - 1] = True, True
            kept = np.ones(len(ids), bool)
            stops = np.cumsum(lengths)
            for start in (stops - lengths)[~first]:
                kept[start : start + before] = False
            for stop in stops[~last]:
                kept[stop - behind : stop] = False
            ids = ids[kept]
            lengths = lengths - np.where(first, 0, before) - np.where(last, 0, behind)
        return ids, np.add.reduceat(lengths, ends - counts) if len(pieces) else lengths


def _cost(encoder: BatchEncoder) -> int:
    return _COST.get(encoder.name, _COST["megatron"])


def _batches(texts: Iterable[list[str]], size: int) -> Iterator[list[str]]:
    """Yield some pieces at a time, of about ``size`` characters together."""
    batch, taken = list[str](), 0
    for pieces in texts:
        for piece in pieces:
            if batch and taken + len(piece) > size:
                yield batch
                batch, taken = [], 0
            batch.append(piece)
            taken += len(piece)
    yield batch
