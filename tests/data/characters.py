"""A tokenizer of characters, for tests of everything around it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


class Characters:
    """A tokenizer of single characters that acts on some texts."""

    vocab_size = 256
    eod = 0

    def __init__(self, act: Callable[[str], None] = lambda text: None) -> None:
        self.act = act

    def tokenize(self, text: str) -> list[int]:
        self.act(text)
        return [ord(character) for character in text]


def outputs(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("out*"))
