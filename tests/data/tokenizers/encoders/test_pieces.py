"""Long texts in pieces give the ids of whole ones, for each tokenizer that is cut."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_periln.data.tokenizers.encoders import PiecewiseEncoder, TextTooLargeError, open_encoder
from megatron_periln.data.tokenizers.encoders import pieces as pieces_module
from megatron_periln.data.tokenizers.encoders.cuts import Cuts, find_cuts, known_pattern
from megatron_periln.data.tokenizers.encoders.gigatoken import TIKTOKEN_SCHEMES
from megatron_periln.data.tokenizers.resolved_tokenizer import ResolvedTokenizer
from tests.data.tokenizers.encoder_tokenizers import LLAMA, byte_level, encode

CUT = ["gpt2", "llama3", "nfc", "bos", "added", "added words", "added normalized", "lower case"]
CUT += ["metaspace", "word pieces", "unigram", "bare bos", "special as text", "tiktoken bpe", "tiktoken v1"]
WHOLE = ["own words", "normalized", "defined", "without bytes", "unigram pieces", "characters"]
PATTERNS = {
    "Qwen": LLAMA.replace("{1,3}", ""),
    "GPT-4o": next(iter(TIKTOKEN_SCHEMES)).replace(r"\p{N}|", r"\p{N}{1,3}|"),
    "possessive": LLAMA.replace("[^\\r\\n\\p{L}\\p{N}]?", "[^\\r\\n\\p{L}\\p{N}]?+"),
    "DeepSeek": r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| "
    r"?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+".replace('\\"', '"'),
}
WORDS = [
    "a",
    "the",
    "Don't",
    "I'LL",
    "'s",
    "12345",
    "x1",
    "_",
    "...",
    ";",
    "。",
    "漢字",
    "かな",
    "é",
    "e\u0301",
]
WORDS += ["Ж", "ж\u0301", "ﬁ", "Plain", "word", "self", "<s>", "</s>", "<left>", "<right>", "<x>y", "▁", "▁a"]
WORDS += ["def f(x):", "http://a.b/c", "\u0301", "\u200b", "한국", "👍🏽", "/"]
SPACES = [" ", "  ", "\n", "\n\n", " \n", "\n ", "\r\n", "\t", "\u3000", "\u00a0", "\u2028", ""]
TEXTS = st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from(SPACES)), max_size=12).map(
    lambda parts: "".join(word + space for word, space in parts)
)


def agree(tokenizer: ResolvedTokenizer, examples: int = 60) -> None:
    """Compare texts that are cut wherever they may be with whole ones."""
    whole = open_encoder(tokenizer, tokenizer.kind)
    cuts = find_cuts(tokenizer)
    assert cuts
    cut = PiecewiseEncoder(whole, replace(tokenizer, probes=()))

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(TEXTS, min_size=1, max_size=4))
    def check(texts: list[str]) -> None:
        assert encode(cut, texts) == encode(whole, texts), [cuts.pieces(text, 1) for text in texts]

    check()
    assert len(cuts.pieces("ab cd ef 12 gh", 1)) > 2


@pytest.fixture
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces_module, "_PIECE", 1)
    monkeypatch.setattr(pieces_module, "_AT_ONCE", 5000)


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("name", CUT)
def test_pieces_give_the_ids_of_the_whole(name: str, resolved: Callable[[str], ResolvedTokenizer]) -> None:
    agree(resolved(name))


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("name", PATTERNS)
def test_published_patterns(name: str, resolved: Callable[[str], ResolvedTokenizer]) -> None:
    assert known_pattern(PATTERNS[name])
    agree(replace(resolved("gpt2"), payload=byte_level(PATTERNS[name]).to_str().encode()))


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_not_known_is_not_cut(name: str, resolved: Callable[[str], ResolvedTokenizer]) -> None:
    assert find_cuts(resolved(name)) is None


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}},
        {"pre_tokenizer": None},
        {"added_tokens": [{"content": "a b", "normalized": False}]},
        {"added_tokens": [{"content": "\n", "normalized": False}]},
    ],
)
def test_nor_is_what_depends_on_more(
    change: dict[str, Any], resolved: Callable[[str], ResolvedTokenizer]
) -> None:
    tokenizer = resolved("gpt2")
    content = json.loads(tokenizer.payload)
    assert find_cuts(tokenizer)
    assert find_cuts(replace(tokenizer, payload=json.dumps(content | change).encode())) is None


@pytest.mark.parametrize(
    "pattern", [r"\w+|\s+", r"\p{L}+|\p{N}", r"(?<=a) ?\p{L}+|\s+", r"\p{L}+ \p{L}+|\s+"]
)
def test_unknown_patterns(pattern: str) -> None:
    assert not known_pattern(pattern)


@pytest.mark.usefixtures("short_pieces")
def test_texts_of_one_word(resolved: Callable[[str], ResolvedTokenizer]) -> None:
    """Llama 2's: cut before spaces, which begin a word in each entry of the vocabulary; else not cut."""
    tokenizer = resolved("llama2")
    assert find_cuts(tokenizer) is None
    content = json.loads(tokenizer.payload)
    model = content["model"]
    merges = [merge for merge in model["merges"] if not re.search("[^▁]▁", "".join(merge))]
    made = {"".join(merge) for merge in merges}
    dropped = {"".join(merge) for merge in model["merges"]} - made
    model["merges"] = merges
    assert dropped
    assert any("▁" in token for token in made)
    model["vocab"] = {token: number for token, number in model["vocab"].items() if token not in dropped}
    agree(replace(tokenizer, payload=json.dumps(content).encode()))


@pytest.mark.usefixtures("short_pieces")
def test_megatrons_ids_for_the_probes_decide(
    resolved: Callable[[str], ResolvedTokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong place is found out before it is used."""
    tokenizer = resolved("llama3")
    monkeypatch.setattr(pieces_module, "find_cuts", lambda _: Cuts(re.compile(r"(?<=[a-z])(?=[a-z])")))
    whole = open_encoder(tokenizer, "tokenizers")
    assert encode(PiecewiseEncoder(whole, tokenizer), ["return self"]) == encode(whole, ["return self"])
    unproven = PiecewiseEncoder(whole, replace(tokenizer, probes=()))
    assert encode(unproven, ["return self"]) != encode(whole, ["return self"])


def test_a_text_that_is_too_large(
    resolved: Callable[[str], ResolvedTokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces_module, "_PIECE", 10)
    monkeypatch.setattr(pieces_module, "_MOST", 100 * 170)
    tokenizer = resolved("own words")
    whole = open_encoder(tokenizer, "tokenizers")
    with pytest.raises(
        TextTooLargeError, match=r"a text of 101 bytes; the encoder tokenizers takes about 170"
    ):
        PiecewiseEncoder(whole, tokenizer).encode(["a", "a " * 50 + "a"])
    assert encode(PiecewiseEncoder(whole, tokenizer), ["a " * 50])
    assert encode(PiecewiseEncoder(whole, tokenizer, limited=False), ["a " * 51]) == encode(
        whole, ["a " * 51]
    )
    with pytest.raises(TextTooLargeError, match="without a place where it could be cut"):
        cut = resolved("gpt2")
        PiecewiseEncoder(open_encoder(cut, "tokenizers"), cut).encode(["a b " * 9 + "a" * 200])
