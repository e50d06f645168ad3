"""Texts that the fast encoder leaves to the tokenizer's library, of workers that have not loaded it.

They are few in most inputs, and loading takes as long as encoding a megabyte: the checker has the library.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from megatron_periln.data.tokenizers.encoders import BatchEncoder, Encoded

__all__ = ["FOR_ALL_WORKERS", "Inbox", "RareTexts", "RareTextsEncoder"]

FOR_ALL_WORKERS = 1 << 20
"""Characters that the checker encodes for workers; who needs more loads the library."""


@dataclass(frozen=True)
class RareTexts:
    """What a worker asks for: the ids of these texts."""

    texts: list[str]


class Inbox:
    """What the first process sends to a worker, in order, but for answers, which come first.

    Parameters
    ----------
    connection
        The worker's end of its pipe.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._later: deque[tuple[int, Any]] = deque()

    def next(self) -> tuple[int, Any]:
        """Return the next order, with its chunk's number."""
        return self._later.popleft() if self._later else self._connection.recv()

    def ask(self, question: RareTexts) -> Encoded | None:
        """Return the answer, None if there is nobody to give it."""
        self._connection.send(question)
        while True:
            number, order = self._connection.recv()
            if number is None:
                return order
            self._later.append((number, order))


class RareTextsEncoder:
    """Asks for ids as long as it is answered, then encodes by itself.

    Parameters
    ----------
    encoder
        Gives the same ids.
    ask
        Asks.
    """

    def __init__(self, encoder: BatchEncoder, ask: Callable[[RareTexts], Encoded | None]) -> None:
        self.name = encoder.name
        self._encoder = encoder
        self._ask: Callable[[RareTexts], Encoded | None] | None = ask

    def load(self) -> None:
        """Do nothing: it may never be needed here."""

    def encode(self, texts: list[str]) -> Encoded:
        """Return the token ids of ``texts``."""
        if self._ask and sum(map(len, texts)) <= FOR_ALL_WORKERS:
            if found := self._ask(RareTexts(texts)):
                return found
            self._ask = None
        return self._encoder.encode(texts)
