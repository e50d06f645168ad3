"""An encoder that reads entries of a vocabulary otherwise than the tokenizer's library is not taken."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_periln.data.tokenizers import resolve
from megatron_periln.data.tokenizers.encoders import choose_encoder, selection
from megatron_periln.data.tokenizers.megatron_tokenizer import build_tokenizer
from megatron_periln.data.tokenizers.probes import vocabulary_texts
from megatron_periln.data.tokenizers.resolve import resolve_tokenizer, wrap_tokenizer
from tests.convert.tokens.kinds import parse, sentencepiece_model, with_kind, with_pieces
from tests.data.tokenizers.encoder_tokenizers import needs_gigatoken

PLAIN = {"remove_extra_whitespaces": False}
MODELS: dict[str, tuple[Callable[[bytes], bytes], str | None]] = {
    "as trained": (lambda model: model, None),
    "appended, and equally good": (lambda model: with_pieces(model, "selfx", "fo", "lf"), "'selfo'"),
    "appended, and of characters of no piece": (lambda model: with_pieces(model, "漢字"), "'漢字'"),
    "unused": (lambda model: with_kind(model, "▁self", 5), "' self'"),
}


def flags(path: Path, name: str) -> Namespace:
    path.write_bytes(MODELS[name][0](sentencepiece_model(**PLAIN)))
    return parse("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", path)


@needs_gigatoken
@pytest.mark.parametrize("name", MODELS)
def test_pieces_that_gigatoken_reads_otherwise(tmp_path: Path, name: str) -> None:
    args, text = flags(tmp_path / "tokenizer.model", name), MODELS[name][1]
    tokenizer = wrap_tokenizer(build_tokenizer(args), args)
    chosen = choose_encoder(tokenizer)
    assert chosen.encoder.name == ("sentencepiece" if text else "gigatoken")
    assert (tokenizer.unlike is None) is (text is None)
    if text:
        (note,) = chosen.notes
        assert "\n" not in note
        assert "encoder gigatoken cannot serve SentencePieceTokenizer " in note
        assert f": it is not exact for its vocabulary: for {text} at token " in note


@needs_gigatoken
def test_probes_miss_them(tmp_path: Path) -> None:
    """The negative control."""
    args = flags(tmp_path / "tokenizer.model", "appended, and equally good")
    tokenizer = wrap_tokenizer(build_tokenizer(args), args)
    assert choose_encoder(replace(tokenizer, unlike=None)).encoder.name == "gigatoken"


@needs_gigatoken
def test_it_is_found_out_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    args = flags(tmp_path / "tokenizer.model", "appended, and equally good")
    first = resolve_tokenizer(args)
    monkeypatch.setattr(resolve, "difference_on_vocabulary", lambda *_: pytest.fail("asked again"))
    assert resolve_tokenizer(args).unlike == first.unlike is not None


def test_texts_are_each_entry_and_pairs_and_overlaps() -> None:
    assert vocabulary_texts(["ab", "x", "bc"]) == [
        *("ab", " ab", "x", " x", "bc", " bc", "abx", " abx", "xbc", " xbc", "abc", " abc"),
    ]


@needs_gigatoken
def test_an_encoder_that_fails_on_an_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = flags(tmp_path / "tokenizer.model", "as trained")
    tokenizer = wrap_tokenizer(build_tokenizer(args), args)

    def panic(*_: object) -> None:
        raise BaseException("panicked\nhere")

    monkeypatch.setattr(selection, "first_difference", panic)
    assert selection.difference_on_vocabulary(tokenizer, ["a"]) == "BaseException: panicked here"
