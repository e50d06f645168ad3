"""GPT2BPETokenizer and BERT's tokenizers from the files that flags name, without any network."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path

import pytest

from megatron_periln.data.tokenizers.encoders import choose_encoder
from megatron_periln.data.tokenizers.megatron_tokenizer import (
    add_tokenizer_args,
    build_tokenizer,
    check_tokenizer_files,
)
from megatron_periln.data.tokenizers.resolve import resolve_tokenizer
from megatron_periln.errors import PreprocessError
from tests.data.vocabularies import END, TEXT, byte_level_files, reference_ids


def parse(*flags: object) -> Namespace:
    return add_tokenizer_args(ArgumentParser()).parse_args([str(flag) for flag in flags])


def gpt2(vocabulary: Path, merges: Path) -> Namespace:
    kind = ("--tokenizer-type", "GPT2BPETokenizer")
    return parse(*kind, "--vocab-file", vocabulary, "--merge-file", merges)


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, nothing of the hub, no tokenizer known from before."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "TORCH_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))


@pytest.mark.parametrize("end", [True, False], ids=["with its end", "without"])
def test_gpt2_is_that_of_its_files(tmp_path: Path, end: bool) -> None:
    """Built, resolved, and read again from the cache."""
    files = byte_level_files(tmp_path, 400, end=end)
    expected = reference_ids(*files)
    size = len(json.loads(files[0].read_text())) + (not end)
    built = build_tokenizer(gpt2(*files))
    assert (list(built.tokenize(TEXT)), built.vocab_size) == (expected, size)
    for _ in range(2):
        resolved = resolve_tokenizer(gpt2(*files))
        choice = choose_encoder(resolved)
        assert resolved.kind == "tokenizers"
        assert (choice.encoder.encode([TEXT])[0].tolist(), resolved.vocab_size) == (expected, size)
    assert [resolved.eod] == reference_ids(*files, END)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("BertWordPieceCase", [5, 6, 1, 8, 9]), ("BertWordPieceLowerCase", [5, 6, 7, 9, 9])],
)
def test_bert_is_that_of_its_file(tmp_path: Path, kind: str, expected: list[int]) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "peri", "##ln", "hello", "World", "world"]
    path = tmp_path / "words"
    path.write_text("\n".join(words))
    built = build_tokenizer(parse("--tokenizer-type", kind, "--vocab-file", path))
    assert list(built.tokenize("periln Hello World world")) == [2, *expected, 3]
    assert list(built.vocab)[:10] == words  # type: ignore[attr-defined]


WRONG = {
    "no vocabulary": (["--merge-file", "merges.txt"], "GPT2BPETokenizer needs --vocab-file and --merge-file"),
    "no merges": (["--vocab-file", "vocab.json"], "needs --merge-file beside --vocab-file"),
    "nothing": ([], "GPT2BPETokenizer needs --vocab-file and --merge-file"),
    "the other way round": (
        ["--vocab-file", "merges.txt", "--merge-file", "vocab.json"],
        r"--vocab-file \S+merges.txt: not JSON .*; give a vocab.json",
    ),
    "a list": (
        ["--vocab-file", "list", "--merge-file", "merges.txt"],
        "not a JSON object of tokens and their ids",
    ),
    "others": (
        ["--vocab-file", "vocab.json", "--merge-file", "others"],
        r"--merge-file \S+others:2: 'q q' is no merge of two tokens of --vocab-file",
    ),
    "bytes": (["--vocab-file", "bytes", "--merge-file", "merges.txt"], "--vocab-file .*: cannot be read"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_are_named(tmp_path: Path, name: str) -> None:
    byte_level_files(tmp_path, 300)
    (tmp_path / "list").write_text("[]")
    (tmp_path / "others").write_text("#version: 0.2\nq q\n")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    flags, error = WRONG[name]
    paths = [flag if flag.startswith("--") else tmp_path / flag for flag in flags]
    with pytest.raises(PreprocessError, match=error):
        check_tokenizer_files(parse("--tokenizer-type", "GPT2BPETokenizer", *paths))


def test_what_megatron_can_fetch_is_left_to_it(tmp_path: Path) -> None:
    (tmp_path / "cache" / "megatron").mkdir(parents=True)
    (tmp_path / "cache" / "megatron" / "GPT2BPETokenizer_vocab").touch()
    check_tokenizer_files(parse("--tokenizer-type", "GPT2BPETokenizer"))
