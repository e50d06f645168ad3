"""``train_tokenizer.py`` in this process, on a small corpus."""

from __future__ import annotations

import argparse
import ast
import json
import random
from pathlib import Path

import pytest

from tests.data.companions import Result, load_tool, snapshot

KINDS = {
    "bpe": ["--tokenizer-type", "SentencePieceTokenizer"],
    "unigram": ["--tokenizer-type", "SentencePieceTokenizer", "--model-type", "unigram"],
    "llama3": ["--tokenizer-type", "HuggingFaceTokenizer"],
    "gpt2": ["--tokenizer-type", "HuggingFaceTokenizer", "--split", "gpt2"],
}


def write_corpus(path: Path) -> Path:
    """Write Python's own sources as JSON Lines, a document for each definition."""
    source = "".join(Path(module.__file__).read_text() for module in (argparse, ast, random))
    documents = [{"text": text, "title": text[:20]} for text in source.split("\n\n\n")]
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return path


class Training:
    """Runs the tool on the corpus in ``folder``, into ``folder / "out"``."""

    def __init__(self, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.out = folder / "out"
        self.corpus = write_corpus(folder / "corpus.jsonl")
        self._capfd = capfd

    def run(self, kind: str, *argv: object) -> Result:
        flags = [*KINDS[kind], "--input", self.corpus, "--vocab-size", 600, "--output", self.out, *argv]
        code = load_tool("train_tokenizer").main([str(argument) for argument in flags])
        return Result(code, *self._capfd.readouterr())

    def refusal(self, kind: str, *argv: object) -> str:
        """Return the one line of its error, nothing having changed."""
        before = snapshot(self.folder)
        code, stdout, stderr = self.run(kind, *argv)
        errors = [line for line in stderr.splitlines() if not line.startswith("Training on ")]
        assert (code, stdout) == (1, "")
        assert len(errors) == 1, stderr
        assert errors[0].startswith("error: ")
        assert snapshot(self.folder) == before
        return errors[0]
