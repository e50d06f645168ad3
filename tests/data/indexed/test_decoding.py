"""``inspect_dataset.py --decode``: Megatron's tokenizer gives the texts back."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.data.companions import (
    SMALL,
    build,
    refusal,
    run_tool,
)

TEXTS = ("one two", "", "the third text, which is longer than the others by far", "four")


@pytest.fixture
def run() -> Callable[..., str]:
    """Run the tool; return what it prints."""

    def run_inspect(*argv: object) -> str:
        code, stdout, stderr = run_tool("inspect_dataset", *argv)
        assert (code, stderr) == (0, "")
        return stdout

    return run_inspect


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    return partial(refusal, "inspect_dataset", tmp_path)


@pytest.fixture
def texts(tmp_path: Path, megatron_tokenizer: Callable[[str], Any]) -> str:
    tokenizer = megatron_tokenizer("sentencepiece")
    return build(tmp_path / "d", [[tokenizer.tokenize(text)] if text else [] for text in TEXTS])


def test_all(run: Callable, texts: str, tokenizers: dict[str, list[str]]) -> None:
    content = json.loads(run(texts, "--decode", 9, "--json", *tokenizers["sentencepiece"]))
    assert [sample["text"] for sample in content["samples"]] == list(TEXTS)
    lengths = [len(sample["ids"]) for sample in content["samples"]]
    assert lengths == [sample["tokens"] for sample in content["samples"]]
    assert [sample["document"] for sample in content["samples"]] == [0, 1, 2, 3]


def test_some(run: Callable, texts: str, tokenizers: dict[str, list[str]]) -> None:
    text = run(texts, "--decode", 2, "--decode-tokens", 3, *tokenizers["sentencepiece"])
    assert "document 0 (" in text
    assert "tokens, the first 3)" in text
    assert "document 3 (" in text
    assert "document 2 (" not in text


def test_sequences_of_a_document(tmp_path: Path, run: Callable, tokenizers: dict[str, list[str]]) -> None:
    prefix = build(tmp_path / "e", [[[5, 6], [], [7, 8, 9]], [[10]]])
    arguments = ("--decode", 1, "--json", *tokenizers["sentencepiece"], "--decode-tokens")
    for most, expected in ((64, [5, 6, 7, 8, 9]), (3, [5, 6, 7]), (2, [5, 6])):
        (sample,) = json.loads(run(prefix, *arguments, most))["samples"]
        assert (sample["ids"], sample["tokens"]) == (expected, 5)


def test_another_tokenizer(tmp_path: Path, refused: Callable, tokenizers: dict[str, list[str]]) -> None:
    prefix = build(tmp_path / "e", [[[5, 400]]])
    error = refused(prefix, "--decode", 1, *tokenizers["sentencepiece"])
    assert "document 0 holds token 400, but the tokenizer has 400" in error


def test_no_tokenizer(tmp_path: Path, refused: Callable) -> None:
    assert "--tokenizer-type is missing" in refused(build(tmp_path / "e", SMALL), "--decode", 1)
