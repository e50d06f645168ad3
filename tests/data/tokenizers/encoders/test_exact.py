"""Every encoder gives the token ids of Megatron's tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_periln.data.tokenizers.encoders import available_encoders, choose_encoder, open_encoder
from megatron_periln.data.tokenizers.probes import probe_texts
from megatron_periln.data.tokenizers.resolved_tokenizer import ResolvedTokenizer
from megatron_periln.errors import PreprocessError
from tests.data.tokenizers.encoder_tokenizers import (
    ALL,
    EXACT,
    HAS_GIGATOKEN,
    encode,
    needs_gigatoken,
)


@pytest.mark.parametrize("name", ALL)
def test_encoders_are_megatrons(
    name: str, resolved: Callable[[str], ResolvedTokenizer], corpus: list[dict[str, Any]]
) -> None:
    tokenizer = resolved(name)
    chosen = choose_encoder(tokenizer)
    is_exact = name in EXACT | {"bare bos"}
    assert (chosen.encoder.name == "gigatoken") == (is_exact and HAS_GIGATOKEN), chosen.notes
    assert tokenizer.kind in available_encoders(tokenizer)
    texts = [text for document in corpus for text in [document["text"], document["title"]]]
    texts = [text for text in texts if isinstance(text, str)] + probe_texts(["<s>", "<tool>"], ["Word"])
    expected = [list(tokenizer.megatron_tokenizer().tokenize(text)) for text in texts]
    for encoder in [
        chosen.encoder,
        *(open_encoder(tokenizer, each) for each in (tokenizer.kind, "megatron")),
    ]:
        assert encode(encoder, texts) == expected
        assert encode(encoder, []) == []
        assert encode(encoder, [""]) == [list(tokenizer.megatron_tokenizer().tokenize(""))]


PARTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.text(st.sampled_from(" \t\n\r\x0b\x0c\x85\u00a0\u2003\u3000\u200b\ufeff"), max_size=6),
    st.sampled_from(
        ["<s>", "</s>", "<unk>", "<|im_start|>", "<|endoftext|>", "<SPECIAL_8>", "<left>", "self"]
    ),
    st.sampled_from(["don't", "I'LL", "1234", "▁▁a", "<0x41>", "e\u0301", "return x\n\n    def f"]),
)
TEXTS = st.lists(st.lists(PARTS, max_size=8).map("".join), max_size=5)


@pytest.mark.parametrize("name", ALL)
def test_encoders_are_megatrons_on_any_text(name: str, resolved: Callable[[str], ResolvedTokenizer]) -> None:
    tokenizer = resolved(name)
    chosen = choose_encoder(tokenizer)
    encoders = [chosen.encoder, *([chosen.reference] if chosen.reference else [])]

    @settings(
        max_examples=60,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(TEXTS)
    def check(texts: list[str]) -> None:
        expected = [list(tokenizer.megatron_tokenizer().tokenize(text)) for text in texts]
        for encoder in encoders:
            assert encode(encoder, texts) == expected

    check()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("own words", "Unknown pre_tokenizer Split"),
        ("word pieces", "the normalizer BertNormalizer"),
        ("unigram", "the normalizer NFKC"),
        ("unigram pieces", "only BPE"),
        ("without bytes", "only byte_fallback"),
        ("normalized", "not exact for normalized text"),
        ("defined", "not exact for user-defined pieces"),
        ("tiktoken v1", "does not know this pattern"),
        ("added words", "added tokens that must be words"),
        ("added normalized", "added tokens in normalized text"),
        ("lower case", "the normalizer Lowercase"),
        ("tiktoken", "assertion"),
        ("special as text", "split_special_tokens"),
    ],
)
@needs_gigatoken
def test_what_gigatoken_cannot_do(
    name: str, reason: str, resolved: Callable[[str], ResolvedTokenizer]
) -> None:
    chosen = choose_encoder(resolved(name))
    assert chosen.encoder.name == resolved(name).kind
    assert chosen.reference is None
    (note,) = chosen.notes
    assert note.startswith("encoder gigatoken cannot serve ")
    assert reason in note
    assert "\n" not in note
    with pytest.raises(PreprocessError, match=reason):
        choose_encoder(resolved(name), "gigatoken")
