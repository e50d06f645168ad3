"""What gigatoken needs of a process, of Megatron's tokenizers, and of a tokenizer's files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from megatron_periln.data.tokenizers.encoders import gigatoken, open_encoder
from megatron_periln.data.tokenizers.encoders.base import EncoderUnavailableError
from megatron_periln.data.tokenizers.encoders.gigatoken import template_ids
from megatron_periln.data.tokenizers.resolved_tokenizer import ResolvedTokenizer
from tests.data.tokenizers.encoder_tokenizers import encode, needs_gigatoken


@needs_gigatoken
def test_awkward_is_neither_needed_nor_replaced(resolved: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = open_encoder(resolved("gpt2"), "gigatoken")
    monkeypatch.delitem(sys.modules, "awkward", raising=False)
    expected = encode(encoder, ["a b", "", "c"])
    assert "awkward" not in sys.modules
    # A release that asks more of awkward gets the real one.
    monkeypatch.setattr(gigatoken, "AWKWARD", SimpleNamespace(Array=type(None)))
    assert encode(encoder, ["a b", "", "c"]) == expected
    assert sys.modules["awkward"].__name__ == "awkward"


@needs_gigatoken
def test_the_pattern_is_megatrons() -> None:
    from megatron.core.tokenizers.text.libraries import tiktoken_tokenizer

    assert list(gigatoken.TIKTOKEN_SCHEMES) == [tiktoken_tokenizer._PATTERN_TIKTOKEN_V2]


@pytest.mark.parametrize(
    "single", ["$A", "<s> $A", "$A </s>", "<s> <s> $A </s>", "$A <s> $A"], ids=lambda single: single
)
def test_templates(single: str) -> None:
    from tokenizers import processors

    processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 7), ("</s>", 8)])
    content = json.loads(processor.__getstate__())
    before, *after = single.split("$A")
    number = {"<s>": 7, "</s>": 8}
    expected = [[number[token] for token in side.split()] for side in (before, *after)]
    assert template_ids(content) == (tuple(expected) if len(after) == 1 else None)
    assert template_ids({"type": "Else"}) is None
    assert template_ids({"type": "Sequence", "processors": [content, {"type": "Else"}]}) is None


def test_an_unreadable_tokenizer_is_unavailable() -> None:
    broken = ResolvedTokenizer(
        "tokenizers",
        1,
        None,
        "",
        "one",
        payload=b"{}",
        settings={
            "unsupported": None,
            "add_special_tokens": False,
            "encode_special_tokens": False,
            "template": None,
        },
    )
    with pytest.raises(EncoderUnavailableError):
        gigatoken.GigatokenEncoder(broken)
