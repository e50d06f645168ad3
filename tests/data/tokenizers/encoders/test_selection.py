"""An encoder that differs from Megatron's tokenizer is noticed; an encoder by its name, and after a fork."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_periln.data.tokenizers.encoders import (
    available_encoders,
    choose_encoder,
    first_difference,
    open_encoder,
    selection,
)
from megatron_periln.data.tokenizers.resolved_tokenizer import ResolvedTokenizer
from megatron_periln.errors import PreprocessError
from tests.data.tokenizers.encoder_tokenizers import (
    FIXTURES,
    encode,
    needs_gigatoken,
)


class Wrong:
    """An encoder that is right except where a text holds a tab."""

    name = "gigatoken"

    def __init__(self, tokenizer: ResolvedTokenizer) -> None:
        self._right = open_encoder(tokenizer, tokenizer.kind)

    def load(self) -> None:
        pass

    def encode(self, texts: list[str]) -> Any:
        ids, lengths = self._right.encode(texts)
        for end, length, text in zip(np.cumsum(lengths), lengths, texts, strict=True):
            if "\t" in text and length:
                ids[end - 1] += 1
        return ids, lengths


class Short(Wrong):
    def encode(self, texts: list[str]) -> Any:
        ids, lengths = self._right.encode(texts)
        if len(texts) == 7:
            return ids[:-1], lengths - np.eye(1, 7, 6, dtype=np.int64)[0]
        return ids, lengths


class Moved(Wrong):
    def encode(self, texts: list[str]) -> Any:
        ids, lengths = self._right.encode(texts)
        return ids, lengths[::-1]


class Panics(Wrong):
    def encode(self, texts: list[str]) -> Any:
        raise BaseException("panicked\nhere")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [(Wrong, "is not exact for"), (Short, "not exact"), (Moved, "not exact"), (Panics, "fails on")],
)
@pytest.mark.parametrize("name", FIXTURES)
def test_a_wrong_encoder_is_noticed(
    wrong: Any, said: str, name: str, resolved: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = replace(resolved(name), differing=())
    monkeypatch.setitem(selection.ENCODERS, "gigatoken", wrong)
    monkeypatch.setattr(selection, "available_encoders", lambda _: ["gigatoken", tokenizer.kind, "megatron"])
    chosen = choose_encoder(tokenizer)
    assert chosen.encoder.name == tokenizer.kind
    (note,) = chosen.notes
    assert said in note
    assert "\n" not in note
    with pytest.raises(PreprocessError, match=said):
        choose_encoder(tokenizer, "gigatoken")


def test_the_first_difference_is_named(
    resolved: Callable[[str], ResolvedTokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = resolved("tiktoken")
    right = open_encoder(tokenizer, "tiktoken")
    texts = ["", "good", "a b\tc", "\t"]
    last = encode(right, texts)[2][-1]
    message = first_difference(Wrong(tokenizer), right, texts)
    assert message
    assert message.startswith(r"for 'a b\tc' at token ")
    assert f"{last + 1}] , tiktoken".replace(" ,", ",") in message
    assert f"{last}]" in message
    assert first_difference(right, open_encoder(tokenizer, "megatron"), texts) is None
    assert first_difference(Wrong(tokenizer), right, ["", "good"]) is None
    assert first_difference(right, right, []) is None

    def one_more(self: Wrong, texts: list[str]) -> Any:
        ids, lengths = right.encode(texts)
        return np.append(ids, 1), lengths

    monkeypatch.setattr(Wrong, "encode", one_more)
    message = first_difference(Wrong(tokenizer), right, ["a"])
    assert message == "for 1 texts together gigatoken gives 2 ids, tiktoken 1"


def test_a_wrong_library_leaves_megatron(resolved: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = resolved("tiktoken")
    monkeypatch.setitem(selection.ENCODERS, "gigatoken", Wrong)

    class WrongLibrary(Wrong):
        name = "tiktoken"

        def __init__(self, tokenizer: ResolvedTokenizer) -> None:
            self._right = open_encoder(tokenizer, "megatron")

    monkeypatch.setitem(selection.ENCODERS, "tiktoken", WrongLibrary)
    chosen = choose_encoder(tokenizer)
    assert chosen.encoder.name == "megatron"
    assert chosen.notes[-1].startswith("encoder tiktoken is not exact for TikTokenizer ")


def test_an_encoder_by_name(resolved: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tiktoken", "megatron"):
        chosen = choose_encoder(resolved("tiktoken"), name)
        assert (chosen.encoder.name, chosen.reference, chosen.notes) == (name, None, [])
    with pytest.raises(PreprocessError, match=r"encoder tokenizers cannot serve .*: choose from .*tiktoken"):
        choose_encoder(resolved("tiktoken"), "tokenizers")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert available_encoders(resolved("tiktoken")) == ["tiktoken", "megatron"]
    assert choose_encoder(resolved("tiktoken")).notes == []
    with pytest.raises(PreprocessError, match="not installed: pip install gigatoken"):
        choose_encoder(resolved("tiktoken"), "gigatoken")


@needs_gigatoken
@pytest.mark.parametrize("name", ["huggingface", "llama", "tiktoken bpe"])
def test_encoders_work_after_a_fork(name: str, resolved: Callable, hangs_fail: None) -> None:
    chosen = choose_encoder(resolved(name))
    assert chosen.encoder.name == "gigatoken"
    texts = ["some words", "and more\n" * 50] * 20
    expected = encode(chosen.encoder, texts)
    assert encode(chosen.reference, texts) == expected
    child = os.fork()
    if child == 0:
        same = encode(chosen.encoder, texts) == encode(chosen.reference, texts) == expected
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
