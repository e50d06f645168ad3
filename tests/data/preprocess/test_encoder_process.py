"""A run with a tokenizer that is known has the library's encoder in one process of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_periln.data.preprocess.encode import _with_ends
from megatron_periln.data.tokenizers.encoders.libraries import TokenizersEncoder
from tests.data.preprocessing import read, to_lines
from tests.data.tokenizers.encoder_tokenizers import needs_gigatoken
from tests.data.worker_runs import Started

TEXTS = [f"some words, number {number}, and \u2c5f\U0001fae8" * 5 for number in range(40)]


@needs_gigatoken
def test_one_process_loads_it(
    tmp_path: Path,
    run: Callable,
    started: Started,
    tokenizers: dict[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first run proves the fast encoder in this process; the bytes of both are the same."""
    monkeypatch.setattr("megatron_periln.data.preprocess.plan.CHUNK_BYTES", 1000)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "in.jsonl").write_bytes(to_lines(TEXTS))
    log = tmp_path / "log"
    library = TokenizersEncoder.load

    def load(self: TokenizersEncoder) -> None:
        with log.open("a") as stream:
            stream.write(f"{os.getpid()} ")
        library(self)

    monkeypatch.setattr(TokenizersEncoder, "load", load)
    encode = TokenizersEncoder.encode

    def encode_noted(self: TokenizersEncoder, texts: list[str]) -> object:
        with log.open("a") as stream:
            stream.write(f"{os.getpid()} ")
        return encode(self, texts)

    monkeypatch.setattr(TokenizersEncoder, "encode", encode_noted)
    found = []
    for name in ("first", "second"):
        log.write_text("")
        flags = ["--output-prefix", tmp_path / name, "--workers", 2, *tokenizers["huggingface"]]
        code, stderr = run("--input", tmp_path / "in.jsonl", "--append-eod", *flags)
        assert code == 0, stderr
        assert ", gigatoken): " in stderr
        found.append(read(tmp_path / f"{name}_text_document"))
        assert not started()
    assert found[0] == found[1]
    (there,) = set(log.read_text().split())  # of the second run: loaded, and asked by both workers
    assert there != str(os.getpid())


@pytest.mark.parametrize("long", [False, True])
def test_ends_of_documents(long: bool) -> None:
    ids = np.arange(2000 if long else 50, dtype=np.uint32)
    for ends in ([], [0], [len(ids)], [0, 3, 3, 7, len(ids)], [5, 9]):
        found = _with_ends(ids, np.array(ends, np.int64), 77)
        assert found.dtype == ids.dtype
        assert found.tolist() == np.insert(ids, np.array(ends, np.int64), 77).tolist()
