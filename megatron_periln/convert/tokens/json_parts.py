"""What every ``tokenizer.json`` that is made from another format is made of."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

__all__ = ["InexpressibleError", "added_token", "splits"]


class InexpressibleError(Exception):
    """The rule of a tokenizer that a ``tokenizer.json`` has nothing for."""


def added_token(number: int, text: str) -> dict[str, Any]:
    """Return the entry of a special token."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": text, **flags, "special": True}


def splits(text: str, words: Container[str]) -> Iterator[tuple[str, str]]:
    """Yield every split of a text into two words: what BPE may merge to it."""
    for at in range(1, len(text)):
        if text[:at] in words and text[at:] in words:
            yield text[:at], text[at:]
