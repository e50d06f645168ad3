"""Bit-identity with ``IndexedDatasetBuilder`` fed document by document, as Megatron-LM's tool does."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

KINDS = ["sentencepiece", "huggingface", "tiktoken"]


def encode(tokenizer: Any, text: str | list[str], append_eod: bool) -> list[list[int]]:
    """Return the sequences of one document."""
    sentences = [text] if isinstance(text, str) else text
    sequences = [list(ids) for ids in map(tokenizer.tokenize, sentences) if len(ids) > 0]
    if sequences and append_eod:
        sequences[-1].append(tokenizer.eod)
    return sequences


def reference(prefix: Path, tokenizer: Any, texts: Iterable[str | list[str]], append_eod: bool) -> Path:
    """Write the dataset with Megatron's builder."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(tokenizer.vocab_size))
    for text in texts:
        sequences = encode(tokenizer, text, append_eod)
        builder.add_document([token for ids in sequences for token in ids], [len(ids) for ids in sequences])
    builder.finalize(f"{prefix}.idx")
    return prefix


def read(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


@pytest.fixture
def written(tmp_path: Path, run: Callable, write_lines: Callable) -> Callable[..., Path]:
    """Preprocess documents, or a file or glob, and return the output prefix."""

    def write(documents: Any, *flags: object) -> Path:
        source = write_lines(tmp_path / "in.jsonl", documents) if isinstance(documents, list) else documents
        code, stderr = run("--input", source, "--output-prefix", tmp_path / "out", *flags)
        assert code == 0, stderr
        return tmp_path / "out_text_document"

    return write


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("append_eod", [False, True])
@pytest.mark.parametrize("workers", [1, 3])
def test_tokenizers(
    tmp_path: Path,
    corpus: list[dict[str, Any]],
    written: Callable,
    tokenizers: dict[str, list[str]],
    megatron_tokenizer: Callable,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    append_eod: bool,
    workers: int,
) -> None:
    monkeypatch.setattr("megatron_periln.data.preprocess.plan.CHUNK_BYTES", 1000)
    tokenizer = megatron_tokenizer(kind)
    eod = ["--append-eod"] if append_eod else []
    written(corpus, "--json-keys", "text", "title", "--workers", workers, *tokenizers[kind], *eod)
    for key in ("text", "title"):
        texts = [document[key] for document in corpus]
        ours = tmp_path / f"out_{key}_document"
        expected = read(reference(tmp_path / "reference", tokenizer, texts, append_eod))
        assert read(ours) == expected

        assert read(reference(tmp_path / "other_eod", tokenizer, texts, not append_eod)) != expected
        changed = [*texts[:-1], texts[-1] + "!"]
        assert read(reference(tmp_path / "changed", tokenizer, changed, append_eod)) != expected

        dataset = IndexedDataset(str(ours))
        sequences = [ids for text in texts for ids in encode(tokenizer, text, append_eod)]
        assert len(dataset) == len(sequences)
        assert all(np.array_equal(dataset[n], ids) for n, ids in enumerate(sequences))
        assert len(dataset.document_indices) == len(texts) + 1


@pytest.mark.parametrize("sequential", [False, True])
def test_partitions(
    tmp_path: Path,
    corpus: list[dict[str, Any]],
    written: Callable,
    write_lines: Callable,
    tokenizers: dict[str, list[str]],
    megatron_tokenizer: Callable,
    sequential: bool,
) -> None:
    write_lines(tmp_path / "part_a.jsonl", corpus[:7])
    write_lines(tmp_path / "part_b.jsonl", corpus[7:])
    flags = ["--keep-sequential-samples"] if sequential else []
    ours = written(tmp_path / "part_*.jsonl", "--partitions", 2, *flags, *tokenizers["huggingface"])
    tokenizer = megatron_tokenizer("huggingface")
    texts = [document["text"] for document in corpus]
    in_order = read(reference(tmp_path / "in_order", tokenizer, texts, False))
    dealt = read(reference(tmp_path / "dealt", tokenizer, texts[0::2] + texts[1::2], False))
    assert in_order != dealt
    assert read(ours) == (in_order if sequential else dealt)


def test_more_partitions_than_documents(
    tmp_path: Path, written: Callable, tokenizers: dict[str, list[str]], megatron_tokenizer: Callable
) -> None:
    ours = written([{"text": "a"}, {"text": "b"}], "--partitions", 5, *tokenizers["tiktoken"])
    expected = reference(tmp_path / "reference", megatron_tokenizer("tiktoken"), ["a", "b"], False)
    assert read(ours) == read(expected)


@pytest.mark.parametrize("form", ["crlf", "no line end", "gzip", "glob"])
def test_input_forms(
    tmp_path: Path,
    corpus: list[dict[str, Any]],
    written: Callable,
    tokenizers: dict[str, list[str]],
    megatron_tokenizer: Callable,
    form: str,
) -> None:
    lines = [json.dumps(document) for document in corpus]
    source = tmp_path / "in"
    match form:
        case "crlf":
            source.write_bytes("".join(line + "\r\n" for line in lines).encode())
        case "no line end":
            source.write_text("\n".join(lines))
        case "gzip":
            source = tmp_path / "in.jsonl.gz"
            source.write_bytes(gzip.compress("\n".join(lines).encode()))
        case "glob":
            (tmp_path / "shard_0").write_text("\n".join(lines[:3]))
            (tmp_path / "shard_1.gz").write_bytes(gzip.compress("\n".join(lines[3:]).encode()))
            source = tmp_path / "shard_*"
    ours = written(source, *tokenizers["tiktoken"])
    texts = [document["text"] for document in corpus]
    assert read(ours) == read(reference(tmp_path / "reference", megatron_tokenizer("tiktoken"), texts, False))


@pytest.mark.parametrize(("vocab_size", "itemsize"), [(65499, 2), (65500, 4)])
def test_dtype_follows_the_vocabulary(written: Callable, vocab_size: int, itemsize: int) -> None:
    flags = ("--tokenizer-type", "NullTokenizer", "--vocab-size", vocab_size, "--append-eod")
    ours = written([{"text": "1 2 3"}], *flags)
    assert Path(f"{ours}.bin").stat().st_size == 4 * itemsize
    dataset = IndexedDataset(str(ours))
    assert dataset[0].tolist() == [1, 2, 3, vocab_size - 1]
