"""``check_indexed_dataset``: the counts of a good dataset, one clear message for each damage."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megatron_periln.data import IndexedDatasetError, IndexedDatasetInfo, check_indexed_dataset
from megatron_periln.data.indexed.format import DTYPES

DOCUMENTS = [[[1, 2, 3], [4]], [], [[5, 6]]]


def build(prefix: Path, dtype: type = np.uint16, multimodal: bool = False) -> Path:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype, multimodal=multimodal)
    for document in DOCUMENTS:
        builder.add_document(
            [token for sentence in document for token in sentence],
            [len(sentence) for sentence in document],
            [0] * len(document),
        )
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return build(tmp_path / "corpus_text_document")


def refusal(prefix: object) -> str:
    with pytest.raises(IndexedDatasetError) as caught:
        check_indexed_dataset(str(prefix))
    message = str(caught.value)
    assert "\n" not in message
    return message


def patch(path: Path, offset: int, content: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[offset : offset + len(content)] = content
    path.write_bytes(data)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("multimodal", [False, True])
def test_good_dataset(tmp_path: Path, dtype: type, multimodal: bool) -> None:
    prefix = build(tmp_path / "d", dtype, multimodal)
    expected = IndexedDatasetInfo(dtype=np.dtype(dtype), sequences=3, documents=3, tokens=6)
    assert check_indexed_dataset(prefix) == expected
    assert check_indexed_dataset(str(prefix)) == expected


def test_dtype_codes_are_megatrons() -> None:
    assert {code: np.dtype(DType.dtype_from_code(code)) for code in range(1, 9)} == DTYPES
    assert len(DType) == len(DTYPES)


def test_pointers_in_any_order(prefix: Path) -> None:
    idx = Path(f"{prefix}.idx")
    pointers_at = 34 + 3 * 4
    patch(idx, pointers_at, struct.pack("<3q", 6, 4, 0))
    assert check_indexed_dataset(prefix).tokens == 6
    patch(idx, pointers_at, struct.pack("<3q", 6, 4, 10))
    message = refusal(prefix)
    assert "truncated: 12 bytes" in message
    assert "needs 14" in message


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_one_file_missing(prefix: Path, suffix: str) -> None:
    Path(f"{prefix}{suffix}").unlink()
    message = refusal(prefix)
    assert f"{prefix}{suffix}: no such file" in message
    assert "copy the missing one" in message


def test_prefix_of_the_prefix(prefix: Path) -> None:
    build(prefix.with_name("corpus_title_document"))
    build(prefix.with_name("other_text_document"))
    message = refusal(prefix.with_name("corpus"))
    assert str(prefix.with_name("corpus")) in message
    assert "without .bin/.idx" in message
    assert f"did you mean {prefix} or {prefix.with_name('corpus_title_document')}?" in message
    assert "other" not in message


@pytest.mark.parametrize("name", ["nothing", "no/such/folder", "odd[name"])
def test_nothing_near(prefix: Path, name: str) -> None:
    path = prefix.parent / name
    assert f"no dataset in {path.parent} starts with that name" in refusal(path)


def test_a_corpus(prefix: Path) -> None:
    corpus = prefix.with_name("corpus.jsonl")
    corpus.touch()
    assert "corpus.jsonl: a file, and no indexed dataset: preprocess it" in refusal(corpus)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_prefix_with_a_suffix(prefix: Path, suffix: str) -> None:
    assert f"takes the prefix without .bin/.idx: use {prefix}" in refusal(f"{prefix}{suffix}")


@pytest.mark.parametrize(
    ("offset", "content", "expected"),
    [
        (0, b"PK", "not an indexed dataset"),
        (9, struct.pack("<Q", 2), "unsupported version 2"),
        (17, b"\x09", "unknown dtype code 9"),
        (17, b"\x00", "unknown dtype code 0"),
        (18, struct.pack("<Q", 4), "truncated: 102 bytes, but its header, with 4 sequences"),
        (18, struct.pack("<Q", 1), "too long: 102 bytes"),
        (94, struct.pack("<q", 2), "the documents do not end where the 3 sequences do"),
    ],
)
def test_damaged_index(prefix: Path, offset: int, content: bytes, expected: str) -> None:
    idx = Path(f"{prefix}.idx")
    assert idx.stat().st_size == 102
    patch(idx, offset, content)
    message = refusal(prefix)
    assert message.startswith(f"{idx}: ")
    assert expected in message
    assert "preprocess" in message


@pytest.mark.parametrize(("size", "expected"), [(0, "0 bytes"), (20, "20 bytes"), (101, "needs 102")])
def test_truncated_index(prefix: Path, size: int, expected: str) -> None:
    idx = Path(f"{prefix}.idx")
    idx.write_bytes(idx.read_bytes()[:size])
    message = refusal(prefix)
    assert f"{idx}: truncated: {size} bytes" in message
    assert expected in message


def test_truncated_tokens(prefix: Path) -> None:
    bin_ = Path(f"{prefix}.bin")
    bin_.write_bytes(bin_.read_bytes()[:-1])
    message = refusal(prefix)
    assert f"{bin_}: truncated: 11 bytes, but {prefix.name}.idx needs 12" in message


def test_no_tokens(tmp_path: Path) -> None:
    prefix = tmp_path / "empty"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    builder.add_document([], [])
    builder.finalize(f"{prefix}.idx")
    assert "holds no tokens" in refusal(prefix)
    with pytest.raises(ValueError, match="empty file"):
        IndexedDataset(str(prefix))


def test_blocks(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = check_indexed_dataset(prefix)
    monkeypatch.setattr("megatron_periln.data.indexed.format.BLOCK", 2)
    assert check_indexed_dataset(prefix) == whole


def test_looking_at_the_last_sequence_only(prefix: Path, tmp_path: Path) -> None:
    def check() -> IndexedDatasetInfo:
        return check_indexed_dataset(prefix, every_sequence=False)

    assert check() == check_indexed_dataset(prefix)
    bin_ = Path(f"{prefix}.bin")
    content = bin_.read_bytes()
    bin_.write_bytes(content[:-1])
    with pytest.raises(IndexedDatasetError, match="truncated: 11 bytes"):
        check()
    bin_.write_bytes(b"")
    with pytest.raises(IndexedDatasetError, match="holds no tokens"):
        check()
    bin_.write_bytes(content)
    patch(Path(f"{prefix}.idx"), 34 + 3 * 4, struct.pack("<q", 100))  # the first sequence
    check()
    with pytest.raises(IndexedDatasetError, match="truncated"):
        check_indexed_dataset(prefix)


def test_import_is_light() -> None:
    code = "import sys, megatron_periln.data.indexed.format; print({'torch', 'megatron'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_written_dataset_is_accepted(
    tmp_path: Path, run: Callable, write_lines: Callable, tokenizers: dict[str, list[str]]
) -> None:
    lines = write_lines(tmp_path / "in.jsonl", [{"text": "one"}, {"text": ""}, {"text": "two"}])
    code, stderr = run("--input", lines, "--output-prefix", tmp_path / "out", *tokenizers["sentencepiece"])
    assert code == 0, stderr
    info = check_indexed_dataset(tmp_path / "out_text_document")
    assert (info.documents, info.sequences, info.dtype) == (3, 2, np.dtype(np.uint16))
