"""``train_tokenizer.py``: nothing is lost where it fails, and bad input is one clear line."""

from __future__ import annotations

import argparse
import errno
import gzip
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_periln.command_line import parse_size
from megatron_periln.data.tokenizer_training.train import _check_special
from tests.data.companions import (
    Result,
    load_tool,
    snapshot,
)
from tests.data.training_runs import Training


@pytest.fixture
def training(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Training:
    return Training(tmp_path, capfd)


@pytest.fixture
def run(training: Training) -> Callable[..., Result]:
    return training.run


@pytest.fixture
def refused(training: Training) -> Callable[..., str]:
    return training.refusal


class TestOutput:
    @pytest.mark.parametrize("kind", ["bpe", "llama3"])
    def test_existing(self, run: Callable, refused: Callable, tmp_path: Path, kind: str) -> None:
        run(kind)
        before = snapshot(tmp_path)
        assert "out exists: choose another --output or pass --overwrite" in refused(kind)
        assert run(kind, "--overwrite", "--vocab-size", 500)[0] == 0
        assert snapshot(tmp_path).keys() == before.keys()
        assert snapshot(tmp_path) != before

    def test_other_files_are_never_lost(self, run: Callable, refused: Callable, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        assert run("gpt2")[0] == 0  # an empty folder is nothing to lose
        (tmp_path / "out" / "thesis.tex").write_text("years")
        assert "out: also holds thesis.tex" in refused("gpt2", "--overwrite")
        (tmp_path / "file").write_text("")
        assert "is a file, not a folder" in refused("gpt2", "--overwrite", "--output", tmp_path / "file")
        assert "out: a folder; name a file" in refused("bpe", "--overwrite")

    @pytest.mark.parametrize("kind", ["bpe", "llama3"])
    @pytest.mark.parametrize("function", ["os.fsync", "pathlib.Path.rename", "pathlib.Path.replace"])
    def test_full_disk(
        self, run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, function: str
    ) -> None:
        """The old tokenizer stays as it was."""
        run(kind)
        before = snapshot(tmp_path)

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(function, full)
        code, _, stderr = run(kind, "--overwrite", "--vocab-size", 500)
        if code:
            assert "out: cannot be written: No space left on device" in stderr
            assert snapshot(tmp_path) == before
        else:
            assert function.endswith("rename" if kind == "bpe" else "replace")  # which it does not call

    def test_the_second_rename_fails(
        self, run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run("gpt2")
        before, replace = snapshot(tmp_path), Path.replace

        def fail_once(source: Path, target: Path) -> Path:
            if source.name.endswith(".tmp"):
                raise OSError(errno.EIO, "Input/output error")
            return replace(source, target)

        monkeypatch.setattr(Path, "replace", fail_once)
        assert run("gpt2", "--overwrite", "--vocab-size", 500)[0] == 1
        assert snapshot(tmp_path) == before

    @pytest.mark.parametrize("kind", ["bpe", "llama3"])
    def test_a_folder_that_takes_no_files(
        self, refused: Callable, monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> None:
        monkeypatch.setattr(
            load_tool("train_tokenizer"), "take_sample", lambda *_, **__: pytest.fail("work before the check")
        )
        assert "--output: the folder /proc is not writable" in refused(kind, "--output", "/proc/tokenizer")


class TestRefusals:
    @pytest.mark.parametrize(
        ("kind", "argv", "expected"),
        [
            ("bpe", ["--vocab-size", 100], "--vocab-size 100: at least 3"),
            ("bpe", ["--vocab-size", 0], "SentencePiece cannot learn 0 ids from this text"),
            ("unigram", ["--vocab-size", 90000], "can be learned from this text; ask for fewer"),
            ("gpt2", ["--vocab-size", 257], "--vocab-size 257: at least 258 are needed"),
            ("llama3", ["--vocab-size", 90000], "can be learned from this text"),
            ("llama3", ["--special-tokens", "<|pad|>"], "<|pad|> is there twice"),
            ("bpe", ["--special-tokens", "a", "a"], "a is there twice"),
            ("bpe", ["--special-tokens", " "], "empty or white space"),
            ("bpe", ["--split", "gpt2"], "--split is not for SentencePieceTokenizer"),
            ("gpt2", ["--no-byte-fallback"], "--no-byte-fallback is not for HuggingFaceTokenizer"),
            ("gpt2", ["--json-keys", "body"], "corpus.jsonl:1: byte 0: no key 'body'; the keys there are"),
            ("gpt2", ["--input", "none*.jsonl"], "--input none*.jsonl: no file matches this glob"),
            ("gpt2", ["--input", "none.jsonl"], "--input none.jsonl: no such file"),
            ("gpt2", ["--input", __file__], f"{__file__}:1: byte 0: malformed JSON"),
        ],
    )
    def test_flags(self, refused: Callable, kind: str, argv: list[object], expected: str) -> None:
        assert expected in refused(kind, *argv)

    @pytest.mark.parametrize(
        ("name", "content", "expected"),
        [
            ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl:2: byte 14: malformed JSON"),
            ("a.jsonl", b'{"text": "a"}\n\n', "a.jsonl:2: byte 14: empty line"),
            ("a.jsonl", b'["text"]\n', "a.jsonl:1: byte 0: a list; each line"),
            ("a.jsonl", b'{"text": null}\n', "a.jsonl:1: byte 0: key 'text' has null"),
            ("a.jsonl", b'{"text": ["a", 1]}\n', "a.jsonl:1: byte 0: key 'text' has a list with a number"),
            ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl:1: byte 0: not UTF-8 at byte 11"),
            ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl:1: byte 0: key 'text' has the lone surrogate"),
            ("a.jsonl", b'{"text": ""}\n', "no text in these files"),
            ("a.txt", b"", "no text in these files"),
            ("a.txt", b"a\n\xff", "a.txt:1: byte 0: not UTF-8 at byte 3"),
            ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n', mtime=0)[:-9], "a.jsonl.gz: cannot be read"),
            ("a.txt.gz", b"text", "a.txt.gz: cannot be read: Not a gzipped file"),
            ("a.txt.zst", b"text", "a.txt.zst: cannot be read"),
        ],
    )
    def test_input(self, refused: Callable, tmp_path: Path, name: str, content: bytes, expected: str) -> None:
        (tmp_path / name).write_bytes(content)
        assert expected in refused("gpt2", "--input", tmp_path / name)

    def test_sizes(self) -> None:
        assert [parse_size(size) for size in ("7", "2k", "500M", "3GB")] == [*(7, 2048, 500 << 20, 3 << 30)]
        for size in ("0", "-1", "1.5G", "M", ""):
            with pytest.raises(argparse.ArgumentTypeError):
                parse_size(size)


def test_special_tokens_are_looked_at_once() -> None:
    class Token(str):
        compared = 0

        def __eq__(self, other: object) -> bool:
            Token.compared += 1
            return super().__eq__(other)

        __hash__ = str.__hash__

    _check_special([Token(f"<{number}>") for number in range(500)])
    assert Token.compared < 500  # those whose hashes collide
