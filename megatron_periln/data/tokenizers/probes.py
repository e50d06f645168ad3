"""Texts on which tokenizers tend to differ: two encoders that agree on all of them agree on documents."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise, permutations

__all__ = ["probe_texts", "vocabulary_texts"]

_RANGES = (
    *((0x00, 0x20), (0x20, 0x7F), (0x80, 0x24F), (0x300, 0x36F), (0x370, 0x5FF), (0x600, 0x6FF)),
    *((0x900, 0x97F), (0xE00, 0xE7F), (0x1100, 0x11FF), (0x1E00, 0x1EFF), (0x2000, 0x206F)),
    *((0x2070, 0x2FFF), (0x3000, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xE000, 0xF8FF)),
    *((0xFE00, 0xFFFF), (0x10000, 0x10FFF), (0x1D400, 0x1D7FF), (0x1F300, 0x1FAFF)),
    *((0x20000, 0x2A6DF), (0xE0000, 0xE007F), (0x00, 0xD7FF), (0xE000, 0x10FFFF)),
)
_SPACES = (
    *(" ", "  ", "   ", "    ", "\t", "\n", "\n\n", "\r\n", "\r", "\x0b", "\x0c", "\x1c", "\x1f", "\x85"),
    *("\u00a0", "\u180e", "\u2003", "\u2028", "\u200b", "\u200d", "\u3000", "\ufeff"),
)
_PIECES = (
    *("the", "The", "THE", "quick", "brownFox", "aB", "ABc", "naïve", "e\u0301", "é", "ﬁ", "Å", "ǅ", "ʰa"),
    *(
        "'s",
        "'S",
        "'ll",
        "'LL",
        "'\u017f",
        "\u2019s",
        "'",
        "don't",
        "I'VE",
        "/",
        "//",
        "...",
        "!!\n",
        "?!",
        "—",
        "…",
    ),
    *("0", "1", "12", "123", "1234567", "3.14", "1,000", "²", "½", "Ⅷ", "१२३", "٣", "0x1F", "1e-9"),
    *(
        "def f(x):\n    return x",
        "for i in range(10):\n\t\tpass\n",
        "<a href='b'>",
        "{}",
        "[[",
        "=>",
        "#include",
    ),
    *("$x^2$", "https://a.b/c?d=e&f", "user@host", "snake_case", "camelCase", "</p>\n\n", "----", "    \n"),
    *(
        "漢字",
        "中文。",
        "ひらがな",
        "カタカナ",
        "한국어",
        "ไทย",
        "हिन्दी",
        "עברית",
        "العربية",
        "Ελληνικά",
        "Русский",
    ),
    *("İ", "ß", "ẞ", "🙂", "👨‍👩‍👧", "🏳️‍🌈", "🇫🇷", "👍🏽", "\U0001f642\u200d\u2194\ufe0f", "\u202eabc\u202c"),
    *("<0x41>", "▁", "▁▁", "▁a", "Ġ", "Ċ", "##ing", "</w>", "\x00", "\x7f", "\ufffd", "\U0010ffff"),
    *("<s>", "</s>", "<unk>", "<pad>", "<|endoftext|>", "<SPECIAL_8>", "[CLS]", "[UNK]", "[INST]"),
)
_RANDOM_PROBES = 900
_LONG = 3000
_LAST = 256


def probe_texts(
    special_tokens: Sequence[str] = (), vocabulary: Sequence[str] = (), mixtures: int = _RANDOM_PROBES
) -> list[str]:
    """Return about a thousand texts, the same for the same arguments.

    Parameters
    ----------
    special_tokens
        Strings that a tokenizer treats in a special way.
    vocabulary
        Strings of its vocabulary.
    mixtures
        How many of the texts are random mixtures.
    """
    draw = random.Random(0)
    special = [token for token in special_tokens if token]
    if len(special) > 64:
        special = [*special[:32], *draw.sample(special[32:], 32)]
    pieces = [*_PIECES, *_SPACES, *special]
    texts = ["", *pieces, *(f" {piece} " for piece in pieces)]
    for token in special:
        texts += [f"a{token}b", f"a {token}  b", f"\n{token}\n{token}{token}", token[:-1], token.upper()]
    texts += [
        "a" * _LONG,
        " " * _LONG,
        "\n" * _LONG,
        "ab" * _LONG,
        "é" * _LONG,
        "7" * _LONG,
        "🙂" * 500,
        "e" + "\u0301" * 500,
        "word " * 500,
        "漢字かな" * 300,
        "\t \t" * 300 + "x",
    ]
    words = [word for word in vocabulary if word.isprintable() and word.isascii()] or list(_PIECES)
    strings = [string for string in vocabulary if string] or list(_PIECES)
    return texts + [_mixture(draw, special, words, strings) for _ in range(mixtures)]


def vocabulary_texts(strings: Sequence[str]) -> list[str]:
    """Return every string of a vocabulary alone and with its neighbour, with and without a leading space.

    They tell what mixtures miss: single entries that one of two implementations reads otherwise. Of the last
    strings, which may have been appended, those that overlap are laid over each other too: which of two
    merges comes first where both are as good.
    """
    pairs = [left + right for left, right in pairwise(strings)]
    overlapping = _overlapping(strings[-_LAST:])
    return [text for string in (*strings, *pairs, *overlapping) for text in (string, f" {string}")]


def _overlapping(strings: Sequence[str]) -> list[str]:
    """Return the texts that end in one string and begin with another, which share what is between."""
    texts = []
    for left, right in permutations(strings, 2):
        for shared in range(min(len(left), len(right)) - 1, 0, -1):
            if left.endswith(right[:shared]):
                texts.append(left + right[shared:])
                break
    return texts


def _mixture(draw: random.Random, special: list[str], words: list[str], strings: list[str]) -> str:
    parts = []
    for _ in range(draw.randint(1, 16)):
        kind = draw.random()
        if kind < 0.25:
            low, high = draw.choice(_RANGES)
            parts.append("".join(chr(draw.randint(low, high)) for _ in range(draw.randint(1, 5))))
        elif kind < 0.45:
            parts.append(draw.choice(_SPACES) * draw.choice((1, 1, 1, 2, 3, 7)))
        elif kind < 0.6:
            parts.append(draw.choice(_PIECES))
        elif kind < 0.65 and special:
            parts.append(draw.choice(special))
        elif kind < 0.8:
            parts.append(" ".join(draw.choices(words, k=draw.randint(1, 4))))
        else:
            parts.append("".join(draw.choices(strings, k=draw.randint(1, 3))))
    return "".join(parts)
