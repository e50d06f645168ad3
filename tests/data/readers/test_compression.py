"""Compression is known by a file's first bytes, whatever its name."""

from __future__ import annotations

import io
import lzma
import os
import tarfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from megatron_periln.data.readers.inputs import find_inputs
from megatron_periln.data.readers.opening import open_input
from megatron_periln.data.tokenizer_training.sampling import read_texts
from megatron_periln.errors import PreprocessError
from tests.data.compressions import COMPRESS, zstandard_frame

LINES = b"".join(b'{"text": "line %d"}\n' % n for n in range(1000))


def texts(path: Path | str) -> list[str]:
    return list(read_texts(find_inputs([str(path)]), ["text"]))


EXPECTED = [f"line {n}" for n in range(1000)]


@pytest.mark.parametrize("name", ["a.jsonl", "a", "a.jsonl.gz", "a.jsonl.zst", "a.jsonl.backup"])
@pytest.mark.parametrize("suffix", sorted(set(COMPRESS) - {""}))
def test_the_name_does_not_matter(tmp_path: Path, name: str, suffix: str) -> None:
    path = tmp_path / name
    path.write_bytes(COMPRESS[suffix](LINES))
    assert texts(path) == EXPECTED


@pytest.mark.parametrize("window_log", [17, 27, 28, 31])
def test_windows_of_zstandard(tmp_path: Path, window_log: int) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard_frame(LINES, window_log))
    assert texts(path) == EXPECTED


def test_a_window_that_is_too_large(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard_frame(LINES, 32))
    with pytest.raises(PreprocessError) as error:
        texts(path)
    assert str(error.value).startswith(f"{path}: cannot be read: ")
    assert "too much memory" in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(
            b"\x50\x2a\x4d\x18\x04\0\0\0size" + zstandard_frame(LINES, 20),
            id="skippable frame first, as pzstd",
        ),
        pytest.param(
            zstandard_frame(LINES, 20) + b"\x5e\x2a\x4d\x18\x04\0\0\0seek",
            id="skippable frame last, a seek table",
        ),
        pytest.param(
            lzma.compress(LINES[:500]) + bytes(8) + lzma.compress(LINES[500:]) + bytes(4), id="xz, padded"
        ),
        pytest.param(lzma.compress(LINES, lzma.FORMAT_ALONE), id="lzma"),
        pytest.param(COMPRESS[".gz"](COMPRESS[".zst"](LINES)), id="twice"),
    ],
)
def test_rarer_forms(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    assert texts(path) == EXPECTED


@pytest.mark.parametrize("suffix", sorted(COMPRESS))
def test_standard_input_and_pipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(COMPRESS[suffix](LINES))))
    assert texts("-") == EXPECTED
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(COMPRESS[suffix](LINES),))
    writer.start()
    assert texts(tmp_path / "pipe") == EXPECTED
    writer.join()


@pytest.mark.parametrize("suffix", sorted(COMPRESS))
def test_small_and_empty_files(tmp_path: Path, suffix: str) -> None:
    for name, content in (
        ("empty", b""),
        (f"named{suffix}", b""),
        (f"compressed{suffix}", COMPRESS[suffix](b"")),
    ):
        (tmp_path / name).write_bytes(content)
        with open_input(str(tmp_path / name)) as opened:
            assert opened.stream.read(10) == b""
    (tmp_path / "one").write_bytes(COMPRESS[suffix](b"1"))
    with open_input(str(tmp_path / "one")) as opened:
        assert (opened.stream.read(10), opened.stream.read(10)) == (b"1", b"")


def test_texts_that_begin_like_a_compression(tmp_path: Path) -> None:
    """With the letters of a magic that are letters: the rest of it is missing."""
    for number, text in enumerate(
        ["BZh91 is a text", "PAR1 is a text", "LZIP and Rar! and PK", "ustar " * 60]
    ):
        (tmp_path / f"{number}.txt").write_text(text)
        assert texts(tmp_path / f"{number}.txt") == [text]


def test_folder(tmp_path: Path) -> None:
    for suffix, compress in COMPRESS.items():
        (tmp_path / f"a.jsonl{suffix}").write_bytes(compress(b'{"text": "%s"}\n' % suffix.encode()))
    assert "".join(texts(tmp_path)) == "".join(sorted(COMPRESS))


def test_parquet_by_its_bytes(tmp_path: Path) -> None:
    for name in ("table.pq", "table"):
        parquet.write_table(pyarrow.table({"text": ["a", "b"]}), tmp_path / name)
        assert texts(tmp_path / name) == ["a", "b"]


def zipped() -> bytes:
    with zipfile.ZipFile(stream := io.BytesIO(), "w") as archive:
        archive.writestr("a.jsonl", LINES)
    return stream.getvalue()


def tarred() -> bytes:
    with tarfile.open(fileobj=(stream := io.BytesIO()), mode="w") as archive:
        (entry := tarfile.TarInfo("a.jsonl")).size = len(LINES)
        archive.addfile(entry, io.BytesIO(LINES))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", zipped, "by its first bytes it is a zip archive; unpack it first"),
        ("a.jsonl.zip", zipped, "by its first bytes it is a zip archive; unpack it first"),
        ("a.jsonl", tarred, "by its first bytes it is a tar archive; unpack it first"),
        ("a.tar.gz", lambda: COMPRESS[".gz"](tarred()), "by its first bytes it is a tar archive; unpack it"),
        ("a.jsonl.Z", lambda: b"\x1f\x9d\x90text", "by its first bytes it is a file of compress; unpack it"),
        (
            "a.jsonl.zstd",
            lambda: LINES,
            "Not a Zstandard file: it begins with b'{\"text'; if it is not compr",
        ),
        (
            "a.txt.bz2",
            lambda: LINES,
            "Not a bzip2 file: it begins with b'{\"text'; if it is not compressed, name it",
        ),
        ("a.jsonl.xz", lambda: b"\xfd7zXZ\0" + bytes(6), "Corrupt input data"),
    ],
)
def test_refused_before_anything_is_written(
    tmp_path: Path, name: str, content: Callable[[], bytes], expected: str
) -> None:
    """In a folder too, where what cannot be read would otherwise be missing from the corpus."""
    path = tmp_path / "corpus" / name
    path.parent.mkdir()
    path.write_bytes(content())
    for value in (path, *([path.parent] if ".jsonl" in name else [])):
        with pytest.raises(PreprocessError) as error:
            find_inputs([str(value)])
        assert str(error.value).startswith(f"{path}: cannot be read: {expected}")
