"""Texts with characters that a fast encoder takes for something else are left to the exact one."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from megatron_periln.data.tokenizers.encoders import characters
from megatron_periln.data.tokenizers.encoders.characters import (
    GuardedEncoder,
    differing_characters,
    with_telling_vocabulary,
)
from megatron_periln.data.tokenizers.encoders.gigatoken import GigatokenEncoder
from megatron_periln.data.tokenizers.encoders.selection import characters_to_avoid, open_encoder
from megatron_periln.data.tokenizers.resolved_tokenizer import ResolvedTokenizer
from tests.data.tokenizers.encoder_tokenizers import (
    encode,
    needs_gigatoken,
)

ALL_CHARACTERS = characters.ASSIGNABLE


class Characters:
    """Gives a text its code points, but some characters another number."""

    name = "characters"

    def __init__(self, wrong: str = "") -> None:
        self.wrong, self.texts = wrong, list[str]()

    def load(self) -> None:
        pass

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        self.texts += texts
        ids = [0 if character in self.wrong else ord(character) for text in texts for character in text]
        return np.array(ids, np.uint32), np.array(list(map(len, texts)), np.int64)


def test_differing_characters_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(characters, "ASSIGNABLE", ALL_CHARACTERS)
    wrong = "\x80é\ud7ff\ue000漢🙂\U0003ffff\U000e0001\U0010ffff"
    assert differing_characters(Characters(wrong), Characters()) == sorted(map(ord, wrong))
    assert differing_characters(Characters(), Characters()) == []


@pytest.mark.parametrize("texts", [[], [""], ["a", "é", ""], ["é"], ["é", "🙂b", "ok", "", "漢é"]])
def test_texts_with_them_are_encoded_exactly(texts: list[str]) -> None:
    fast, exact = Characters("é🙂"), Characters()
    guarded = GuardedEncoder(fast, exact, [ord("é"), ord("🙂")])
    assert encode(guarded, texts) == [list(map(ord, text)) for text in texts]
    assert not any("é" in text or "🙂" in text for text in fast.texts)
    assert all("é" in text or "🙂" in text for text in exact.texts)


def test_which_texts_have_them() -> None:
    """Beside others of the same half of UTF-16's pairs, and of a higher or lower code point."""
    points = [0x870, 0x2FFF, 0xF900, 0x1FAE8, 0x10FFFF]
    others = ["\u086f\u0871", "\ud7ff", "\uf901", "\U0001fae7", "\U0010fffe", "a", "é", "\u201c"]
    draw = random.Random(0)
    for _ in range(500):
        pieces = draw.choices(others, k=draw.randint(0, 5)) + draw.choices(list(map(chr, points)), k=1)
        text = "".join(draw.sample(pieces, len(pieces))[draw.randint(0, 2) :])
        some = draw.sample(points, draw.randint(1, 5))
        guarded = GuardedEncoder(Characters(), Characters(), some)
        assert guarded._has_any(text) == any(ord(character) in some for character in text)


@needs_gigatoken
@pytest.mark.parametrize("name", ["llama3", "tiktoken bpe"])
def test_libraries_that_know_other_unicode_versions(
    name: str, resolved: Callable[[str], ResolvedTokenizer]
) -> None:
    """Fails once no characters differ: then nothing of this is needed."""
    tokenizer = resolved(name)
    telling = with_telling_vocabulary(tokenizer)
    assert telling and tokenizer.differing
    texts = [f'x{chr(point)}",\n' for point in tokenizer.differing]
    exact = open_encoder(telling, telling.kind)
    assert encode(GigatokenEncoder(telling), texts) != encode(exact, texts)
    guarded = GuardedEncoder(GigatokenEncoder(telling), exact, list(tokenizer.differing))
    assert encode(guarded, texts) == encode(exact, texts)
    assert not set("漢é🙂“") & set(map(chr, tokenizer.differing))
    assert isinstance(open_encoder(tokenizer, "gigatoken"), GuardedEncoder)


def test_some_tokenizers_have_no_kinds_of_characters(
    resolved: Callable[[str], ResolvedTokenizer],
) -> None:
    assert with_telling_vocabulary(resolved("llama")) is None


def test_what_cannot_be_found_out(
    resolved: Callable[[str], ResolvedTokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def panic(*_: object) -> None:
        raise BaseException("panic")

    monkeypatch.setattr("megatron_periln.data.tokenizers.encoders.selection.with_telling_vocabulary", panic)
    assert characters_to_avoid(resolved("llama3")) is None
