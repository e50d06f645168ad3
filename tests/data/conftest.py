"""Tiny tokenizers trained on Python's own sources, and the preprocessing tool in this process."""

from __future__ import annotations

import argparse
import base64
import importlib
import inspect
import json
import os
import signal
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_periln.data.tokenizers.resolve import wrap_tokenizer
from tests.data.characters import Characters
from tests.data.worker_runs import Started

TOOL = Path(__file__).parents[2] / "tools" / "preprocess_data.py"
Result = tuple[int, str]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of tokenizers of our own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def few_characters() -> Iterator[None]:
    """Compare encoders on few characters; test_characters.py does it on all."""
    with pytest.MonkeyPatch.context() as patch:
        parts = (range(0x80, 0x800), range(0xA780, 0xA800))
        patch.setattr("megatron_periln.data.tokenizers.encoders.characters.ASSIGNABLE", parts)
        yield


@pytest.fixture(scope="session")
def tool() -> ModuleType:
    return importlib.import_module("megatron_periln.tools.preprocess_data")


@pytest.fixture
def run(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run the tool; return its exit code and what it wrote to stderr."""

    def run_tool(*argv: object) -> Result:
        code = tool.main([str(argument) for argument in argv])
        return code, capsys.readouterr().err

    return run_tool


@pytest.fixture
def refused(run: Callable[..., Result]) -> Callable[..., str]:
    """Run the tool; return the one line of its error."""

    def run_refused(*argv: object) -> str:
        code, stderr = run(*argv)
        assert code == 1, stderr
        (error,) = [line for line in stderr.splitlines() if not line.startswith("note: ")]
        assert error.startswith("error: ")
        return error

    return run_refused


@pytest.fixture(scope="session")
def write_lines() -> Callable[[Path, Iterable[Any]], Path]:
    """Write JSON Lines, every other line with its characters unescaped."""

    def write(path: Path, documents: Iterable[Any]) -> Path:
        lines = [json.dumps(document, ensure_ascii=n % 2 == 0) for n, document in enumerate(documents)]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    return write


@pytest.fixture
def started() -> Started:
    """List the processes that this one has started since the test began, the oldest first."""

    def children() -> set[int]:
        return set(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))

    before = children()
    return lambda: sorted(children() - before)


@pytest.fixture
def hangs_fail() -> Iterator[None]:
    """Turn a hang into a failure."""

    def fail(*_: object) -> None:
        raise AssertionError("the run hangs")

    previous = signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture(scope="session")
def corpus() -> list[dict[str, Any]]:
    """Documents with a title and a text: prose and code, unicode, empty, lists, special tokens."""
    source = "\n".join(inspect.getsource(module) for module in (argparse, textwrap))
    documents: list[dict[str, Any]] = [
        {"title": part.strip().split("\n")[0], "text": part, "number": n}
        for n, part in enumerate(source.split("\n\n\n"))
    ]
    odd: list[tuple[Any, Any]] = [
        ("", "no title"),
        ("empty text", ""),
        ("unicode", "naïve — 漢字 🙂 e\u0301 \u200f\u05e9\u05dc\u05d5\u05dd\u200b \x7f"),
        ("white space", "  a \t b\r\n\u00a0c  "),
        ("special tokens", "</s> <|endoftext|> <s> <unk> <SPECIAL_8>"),
        (["a list", "", "of titles"], ["two\n", "sentences"]),
        ([], [""]),
    ]
    documents[5:5] = [{"title": title, "text": text} for title, text in odd]
    return documents


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The flags of a tokenizer of each kind, with and without an end-of-document token."""
    import sentencepiece
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tokenizers")
    text = [line for line in inspect.getsource(argparse).splitlines() if line.strip()]

    for name, eos in (("pieces", 2), ("pieces_without_eos", -1)):
        with (folder / name).open("wb") as stream:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(text),
                model_writer=stream,
                vocab_size=400,
                byte_fallback=True,
                eos_id=eos,
                minloglevel=2,
            )

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(text, trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>").save_pretrained(folder / "bpe")
    PreTrainedTokenizerFast(tokenizer_object=bpe).save_pretrained(folder / "bpe_without_eos")

    ranks = [bytes([byte]) for byte in range(256)] + [b"  ", b"in", b"re", b"self", b"    ", b"th", b"the"]
    entries = [
        {
            "rank": rank,
            "token_bytes": base64.b64encode(token).decode(),
            "token_str": token.decode(errors="replace"),
        }
        for rank, token in enumerate(ranks)
    ]
    (folder / "tiktoken.json").write_text(json.dumps(entries))

    def flags(kind: str, model: str) -> list[str]:
        return ["--tokenizer-type", kind, "--tokenizer-model", str(folder / model)]

    return {
        "sentencepiece": flags("SentencePieceTokenizer", "pieces"),
        "sentencepiece without eos": flags("SentencePieceTokenizer", "pieces_without_eos"),
        "huggingface": flags("HuggingFaceTokenizer", "bpe"),
        "huggingface without eos": flags("HuggingFaceTokenizer", "bpe_without_eos"),
        "tiktoken": [
            *flags("TikTokenizer", "tiktoken.json"),
            *("--tiktoken-num-special-tokens", "10", "--vocab-size", str(10 + len(ranks))),
        ],
    }


@pytest.fixture(scope="session")
def megatron_tokenizer(tokenizers: dict[str, list[str]]) -> Callable[[str], Any]:
    """Build a tokenizer with Megatron's own functions."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.arguments import _add_tokenizer_args

    built: dict[str, Any] = {}

    def build(name: str) -> Any:
        if name not in built:
            args = _add_tokenizer_args(argparse.ArgumentParser()).parse_args(tokenizers[name])
            args.rank, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size = 1, 128, 1
            built[name] = build_tokenizer(args)
        return built[name]

    return build


@pytest.fixture(scope="session")
def tool_command() -> list[str]:
    return [sys.executable, str(TOOL)]


@pytest.fixture
def stub(tool: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str], None]], None]:
    def use(act: Callable[[str], None]) -> None:
        monkeypatch.setattr(tool, "resolve_tokenizer", lambda _: wrap_tokenizer(Characters(act)))

    return use


@pytest.fixture
def chunks_of_20_bytes(monkeypatch: pytest.MonkeyPatch, stub: Callable) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # takes long
    monkeypatch.setattr("megatron_periln.data.preprocess.plan.CHUNK_BYTES", 20)
    stub(lambda text: None)
