"""Probes are asked once: again for another tokenizer, library, processor or Python, or a damaged proof."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_periln.data.tokenizers import cache as tokenizer_cache
from megatron_periln.data.tokenizers import proofs
from megatron_periln.data.tokenizers.encoders import choose_encoder, selection
from megatron_periln.data.tokenizers.megatron_tokenizer import add_tokenizer_args
from megatron_periln.data.tokenizers.resolve import resolve_tokenizer
from megatron_periln.data.tokenizers.resolved_tokenizer import ResolvedTokenizer
from megatron_periln.errors import PreprocessError
from tests.data.tokenizers.encoder_tokenizers import encode, needs_gigatoken

pytestmark = needs_gigatoken
TEXTS = ["some words", "", "and more\n" * 50, "\u0870 \U0001fae8 naïve"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tokenizer_cache.cache_folder()


@pytest.fixture
def resolve(folder: Path, tokenizers: dict[str, list[str]]) -> Callable[[], ResolvedTokenizer]:
    """Make a tokenizer of the cache, once, and read it from there."""
    args = add_tokenizer_args(argparse.ArgumentParser()).parse_args(tokenizers["huggingface"])
    return lambda: resolve_tokenizer(args)


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The encoders whose ids for the probes were compared, in order."""
    names: list[str] = []
    compare = selection._difference_from_probes

    def difference(encoder: Any, resolved: ResolvedTokenizer) -> str | None:
        names.append(encoder.name)
        return compare(encoder, resolved)

    monkeypatch.setattr(selection, "_difference_from_probes", difference)
    return names


def test_probes_are_compared_once(
    resolve: Callable[[], ResolvedTokenizer], folder: Path, probed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = choose_encoder(resolve())
    assert probed == ["gigatoken"]
    again = choose_encoder(resolve())
    assert probed == ["gigatoken"]
    assert again.encoder.name == "gigatoken"
    assert again.reference
    assert encode(again.encoder, TEXTS) == encode(first.encoder, TEXTS) == encode(again.reference, TEXTS)
    choose_encoder(resolve(), "tokenizers")
    choose_encoder(resolve(), "tokenizers")
    assert probed == ["gigatoken", "tokenizers"]

    monkeypatch.setattr(proofs, "_processor", lambda: ["another"])
    choose_encoder(resolve())
    assert len(probed) == 3
    size = proofs._library("gigatoken")
    assert [Path(path).suffix for path, _, _ in size] == [".so"]
    changed = {"gigatoken": [(path, size, time + 1) for path, size, time in size]}
    library = proofs._library
    monkeypatch.setattr(proofs, "_library", lambda name: changed.get(name) or library(name))
    choose_encoder(resolve())
    choose_encoder(resolve())
    assert len(probed) == 4
    monkeypatch.setattr("sys.version", "another Python")
    choose_encoder(resolve())
    assert len(probed) == 5
    assert [path.name for path in folder.iterdir()] == [resolve().entry]


def test_a_proof_is_of_one_tokenizer(
    resolve: Callable[[], ResolvedTokenizer], folder: Path, probed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of one that was wrapped, of one of other versions, nor of an entry with other probes."""
    resolved = resolve()
    choose_encoder(resolved)
    proof = next(folder.rglob("proof-*"))
    choose_encoder(replace(resolved, entry=None))
    assert len(probed) == 2
    found = tokenizer_cache.versions()
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer_cache, "versions", lambda: {**found, "gigatoken": "0"})
        other = resolve()
        assert other.entry != resolved.entry
        foreign = folder / str(other.entry) / proof.name
        foreign.write_text(proof.read_text())
        choose_encoder(other)
    assert len(probed) == 3
    assert foreign.read_text() != proof.read_text()

    sums = proof.parent / "sha256.json"
    sums.write_text(sums.read_text() + " ")
    choose_encoder(resolve())
    assert len(probed) == 4


@pytest.mark.parametrize("damage", [b"", b"0" * 64, b"\xff\xfe", None])
def test_a_damaged_proof_is_replaced(
    damage: bytes | None, resolve: Callable[[], ResolvedTokenizer], folder: Path, probed: list[str]
) -> None:
    choose_encoder(resolve())
    proof = next(folder.rglob("proof-*"))
    good = proof.read_bytes()
    if damage is None:
        proof.unlink()
    else:
        proof.write_bytes(damage)
    choose_encoder(resolve())
    assert (len(probed), proof.read_bytes()) == (2, good)
    assert not [path for path in proof.parent.iterdir() if path.name.startswith(".")]


def test_a_cache_that_cannot_be_written(
    resolve: Callable[[], ResolvedTokenizer],
    folder: Path,
    probed: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resolved = resolve()

    def refuse(path: Path, text: str) -> None:
        raise PermissionError(path)

    monkeypatch.setattr(proofs, "write_text", refuse)
    for number in (1, 2):
        assert choose_encoder(resolved).encoder.name == "gigatoken"
        assert len(probed) == number
    assert not list(folder.rglob("proof-*"))


def test_a_wrong_encoder_gets_no_proof(
    resolve: Callable[[], ResolvedTokenizer], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved = resolve()
    text, ids = resolved.probes[-1]
    wrong = replace(resolved, probes=(*resolved.probes[:-1], (text, [*ids, 1])))
    for _ in range(2):
        with pytest.raises(PreprocessError, match="is not exact for"):
            choose_encoder(wrong, "gigatoken")
    assert not list(folder.rglob("proof-*"))
