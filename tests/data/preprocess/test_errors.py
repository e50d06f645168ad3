"""Each error is one line that says what is wrong, where, and what to do."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_periln.errors import PreprocessError


@pytest.fixture
def flags(tmp_path: Path, write_lines: Callable, tokenizers: dict[str, list[str]]) -> dict[str, list[Any]]:
    """Flags of a good run, to be changed."""
    return {
        "input": ["--input", write_lines(tmp_path / "in.jsonl", [{"text": "a"}])],
        "output": ["--output-prefix", tmp_path / "out"],
        "tokenizer": list(tokenizers["huggingface"]),
        "more": [],
    }


@pytest.fixture
def refused_with(refused: Callable[..., str], flags: dict[str, list[Any]]) -> Callable[..., str]:
    def run_with(**changed: list[Any]) -> str:
        return refused(*(argument for value in {**flags, **changed}.values() for argument in value))

    return run_with


def test_flags_are_good(run: Callable, flags: dict[str, list[Any]]) -> None:
    code, stderr = run(*(argument for value in flags.values() for argument in value))
    assert code == 0, stderr


def test_missing_input(refused_with: Callable[..., str], tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    assert f"--input {absent}: no such file" in refused_with(input=["--input", absent])
    message = refused_with(input=["--input", f"{absent}*.jsonl"])
    assert f"--input {absent}*.jsonl: no file matches this glob" in message
    (tmp_path / "empty").mkdir()
    message = refused_with(input=["--input", tmp_path / "empty"])
    assert f"--input {tmp_path}/empty: no files in this folder that end with .jsonl" in message


def test_empty_input(refused_with: Callable[..., str], tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert f"no documents: {empty} is empty" in refused_with(input=["--input", empty])
    assert not list(tmp_path.glob("out*"))


def test_only_empty_documents(
    refused_with: Callable[..., str], write_lines: Callable, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "blank.jsonl", [{"text": ""}, {"text": []}])
    message = refused_with(input=["--input", source])
    assert f"{tmp_path}/out_text_document: every document is empty" in message
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (gzip.compress(b'{"text": "a"}\n' * 10_000, mtime=0)[:-9], " (after line 0): Compressed file ended"),
        (b'{"text": "a"}\n', ": Not a gzipped file"),
    ],
)
def test_broken_gzip(refused_with: Callable[..., str], tmp_path: Path, content: bytes, expected: str) -> None:
    source = tmp_path / "broken.gz"
    source.write_bytes(content)
    message = refused_with(input=["--input", source])
    assert f"{source}: cannot be read{expected}" in message


def test_output_exists(
    refused_with: Callable[..., str],
    run: Callable,
    flags: dict[str, list[Any]],
    tmp_path: Path,
    tool: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for suffix in ("bin", "idx"):
        existing = tmp_path / f"out_text_document.{suffix}"
        existing.write_text("precious")
        with monkeypatch.context() as patch:
            patch.setattr(tool, "resolve_tokenizer", lambda _: pytest.fail("work before the check"))
            message = refused_with()
        assert f"{existing} exists: choose another --output-prefix or pass --overwrite" in message
        assert existing.read_text() == "precious"
        existing.unlink()
    existing.write_text("outdated")
    code, stderr = run(*(argument for value in flags.values() for argument in value), "--overwrite")
    assert code == 0, stderr
    assert existing.read_bytes() != b"outdated"


def test_output_folder(refused_with: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = refused_with(output=["--output-prefix", tmp_path / "file" / "out"])
    assert f"cannot make the folder {tmp_path}/file" in message
    message = refused_with(output=["--output-prefix", "/proc/out"])
    assert "--output-prefix: the folder /proc is not writable" in message


@pytest.mark.parametrize("kind", ["huggingface without eos", "sentencepiece without eos"])
def test_no_end_of_document_token(
    refused_with: Callable[..., str], tokenizers: dict[str, list[str]], kind: str
) -> None:
    message = refused_with(tokenizer=tokenizers[kind], more=["--append-eod"])
    assert "--append-eod: this tokenizer has no end-of-document token" in message


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "TikTokenizer", "HuggingFaceTokenizer"])
def test_missing_tokenizer(refused_with: Callable[..., str], tmp_path: Path, kind: str) -> None:
    absent = tmp_path / "absent"
    message = refused_with(tokenizer=["--tokenizer-type", kind, "--tokenizer-model", absent])
    assert f"--tokenizer-model {absent}: no such file" in message
    assert "--tokenizer-model" in refused_with(tokenizer=["--tokenizer-type", kind])


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("SentencePieceTokenizer", "broken.json"),
        ("TikTokenizer", "broken.json"),
        ("HuggingFaceTokenizer", "."),
    ],
)
def test_broken_tokenizer(refused_with: Callable[..., str], tmp_path: Path, kind: str, name: str) -> None:
    (tmp_path / "broken.json").write_text(json.dumps([{"rank": 0}]))
    broken = tmp_path / name
    message = refused_with(tokenizer=["--tokenizer-type", kind, "--tokenizer-model", broken])
    assert f"{kind} cannot be built: " in message


def test_a_file_for_a_folder(refused_with: Callable[..., str], tokenizers: dict[str, list[str]]) -> None:
    kind, model = tokenizers["huggingface"][1], f"{tokenizers['huggingface'][3]}/tokenizer.json"
    message = refused_with(tokenizer=["--tokenizer-type", kind, "--tokenizer-model", model])
    assert f"--tokenizer-model {model}: a file, and HuggingFaceTokenizer takes a folder" in message


def test_model_that_is_not_on_the_hub(
    refused_with: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked once, and not where there is a local copy."""
    asked = []

    def fail(*names: object, **_: object) -> None:
        asked.extend(names)
        raise ValueError("no\nconnection")

    def refusal() -> str:
        return refused_with(
            tokenizer=["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "some/model"]
        )

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.model_info", fail)
    assert "--tokenizer-model some/model: no such folder, and the Hugging Face hub does not" in refusal()
    assert asked == ["some/model"]
    monkeypatch.setattr("megatron.core.tokenizers.MegatronTokenizer.from_pretrained", fail)
    repository = tmp_path / "models--some--model"
    (repository / "snapshots" / "0123").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    assert "ValueError: no connection; some/model is no local folder, and the Hugging Face hub" in refusal()
    assert asked.count("some/model") == 1


def test_tiktoken_vocabulary_size(refused_with: Callable[..., str], tokenizers: dict[str, list[str]]) -> None:
    message = refused_with(tokenizer=[*tokenizers["tiktoken"], "--vocab-size", 1000])
    assert "--vocab-size must be its length, or less, plus --tiktoken-num-special-tokens" in message


def test_no_tokenizer_type(refused_with: Callable[..., str]) -> None:
    assert "--tokenizer-type is missing" in refused_with(tokenizer=[])


def test_token_id_beyond_the_dtype(
    refused_with: Callable[..., str], write_lines: Callable, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "ids.jsonl", [{"text": "1 2"}, {"text": "1 70000"}])
    null = ["--tokenizer-type", "NullTokenizer", "--vocab-size", 100]
    message = refused_with(input=["--input", source], tokenizer=null)
    assert f"{source}:2: byte 16: key 'text' has token id 70000, which does not fit uint16" in message
    message = refused_with(tokenizer=[*null, "--null-tokenizer-eod-id", 70000], more=["--append-eod"])
    assert "end-of-document token 70000 does not fit uint16" in message


@pytest.mark.parametrize(
    "flag", [["--find-optimal-num-workers"], ["--workers-to-check", 1, 2], ["--max-documents", 5]]
)
def test_flags_that_are_not_needed(refused_with: Callable[..., str], flag: list[Any]) -> None:
    assert f"{flag[0]} is not needed, drop it: --workers defaults to" in refused_with(more=flag)


def test_error_of_a_later_line_does_not_hide_the_first(
    refused_with: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_periln.data.preprocess.plan.CHUNK_BYTES", 1)
    source = tmp_path / "two.jsonl"
    source.write_text('{"text": "' + "slow " * 100_000 + '"\nfast\n')
    assert f"{source}:1: byte 0: malformed" in refused_with(input=["--input", source], more=["--workers", 2])


def test_errors_are_pickled_whole() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(PreprocessError("a: b")))
    assert isinstance(error, PreprocessError)
    assert str(error) == "a: b"
