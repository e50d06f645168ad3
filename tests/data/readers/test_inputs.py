"""From ``--input`` to files, and what is refused."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest

from megatron_periln.data.readers.inputs import STDIN, find_inputs
from megatron_periln.errors import PreprocessError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files with every suffix, in folders, and others."""
    monkeypatch.chdir(tmp_path)
    known = ["b.jsonl", "a.jsonl.gz", "c/a.json", "c/d/x.ndjson.zst", "c.parquet", "d.txt", "e.txt.gz"]
    for name in [*known, "README.md", "f.csv", "g.gz", "no_suffix", "c/h.jsonl.bak"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        content = b"text"
        if name.endswith(".gz"):
            content = gzip.compress(content)
        elif name.endswith(".zst"):
            content = pyarrow.compress(content, "zstd", asbytes=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def found(*values: str, format: str = "auto") -> list[tuple[str, str]]:
    return [(file.path, file.format) for file in find_inputs(values, format)]


def test_folder(folder: Path) -> None:
    """Files below it with a known suffix, sorted; what it has besides is no text."""
    assert found(".") == [
        ("a.jsonl.gz", "jsonl"),
        ("b.jsonl", "jsonl"),
        ("c/a.json", "jsonl"),
        ("c/d/x.ndjson.zst", "jsonl"),
        ("c.parquet", "parquet"),
        ("d.txt", "text"),
        ("e.txt.gz", "text"),
    ]


def test_links_to_folders(folder: Path) -> None:
    """They are followed, but for one to a folder above, which would never end."""
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "y.jsonl").touch()
    (folder / "elsewhere" / "up").symlink_to(folder / "c")
    (folder / "c" / "link").symlink_to(folder / "elsewhere")
    (folder / "c" / "nowhere").symlink_to("absent")
    assert found("c") == [
        ("c/a.json", "jsonl"),
        ("c/d/x.ndjson.zst", "jsonl"),
        ("c/link/y.jsonl", "jsonl"),
    ]


def test_globs(folder: Path) -> None:
    assert found("*.jsonl*") == [("a.jsonl.gz", "jsonl"), ("b.jsonl", "jsonl")]
    assert found("[de].txt*") == [("d.txt", "text"), ("e.txt.gz", "text")]
    assert found(f"{folder}/**/*.json") == [(f"{folder}/c/a.json", "jsonl")]
    (folder / "[ab].jsonl").touch()
    assert found("[ab].jsonl") == [("[ab].jsonl", "jsonl")]


def test_several_inputs_keep_their_order(folder: Path) -> None:
    assert found("no_suffix", "c", "b.jsonl", "b.jsonl") == [
        ("no_suffix", "jsonl"),
        ("c/a.json", "jsonl"),
        ("c/d/x.ndjson.zst", "jsonl"),
        ("b.jsonl", "jsonl"),
        ("b.jsonl", "jsonl"),
    ]


def test_format_is_forced(folder: Path) -> None:
    assert found("b.jsonl", "f.csv", format="text") == [("b.jsonl", "text"), ("f.csv", "text")]
    assert found("c.parquet", format="jsonl") == [("c.parquet", "jsonl")]
    assert found(STDIN) == [(STDIN, "jsonl")]


def test_sizes_and_times(folder: Path) -> None:
    (file,) = find_inputs(["b.jsonl"])
    status = (folder / "b.jsonl").stat()
    assert (file.bytes, file.modified) == (4, status.st_mtime_ns)
    assert file.regular
    assert file.seekable
    (file,) = find_inputs(["a.jsonl.gz"])
    assert file.regular
    assert not file.seekable


@pytest.mark.parametrize(
    ("values", "format", "expected"),
    [
        (["absent"], "auto", "--input absent: no such file"),
        (["b.jsonl", "absent*"], "auto", "--input absent*: no file matches this glob"),
        (["c?d"], "auto", "--input c?d: no file matches this glob"),
        (["empty"], "auto", "--input empty: no files in this folder that end with .jsonl, .json, .ndjson, "),
        (["-", "b.jsonl"], "auto", "--input -: standard input must be the only input"),
        (["-"], "parquet", "-: Parquet cannot be compressed or a pipe: give the file itself"),
        (["-"], "text", "-: plain text cannot come through a pipe: give the file itself"),
        (["pipe"], "parquet", "pipe: Parquet cannot be compressed or a pipe"),
        (["pipe.txt"], "auto", "pipe.txt: plain text cannot come through a pipe"),
        (["c.parquet.gz"], "auto", "c.parquet.gz: Parquet cannot be compressed or a pipe"),
        (["json.txt"], "auto", "json.txt: JSON Lines by its look, plain text by its name: choose with"),
        (["json.txt.gz"], "auto", "json.txt.gz: JSON Lines by its look"),
        (["d.txt.gz"], "auto", "d.txt.gz: cannot be read: Not a gzipped file"),
    ],
)
def test_refused(folder: Path, values: list[str], format: str, expected: str) -> None:
    for name in ("empty/README.md", "c_d/file"):
        (folder / name).parent.mkdir()
        (folder / name).touch()
    (folder / "c_d" / "file").unlink()
    os.mkfifo("pipe")
    os.mkfifo("pipe.txt")
    (folder / "c.parquet.gz").touch()
    (folder / "d.txt.gz").write_bytes(b"text")
    (folder / "json.txt").write_bytes(b' {"text": "a"}\n')
    (folder / "json.txt.gz").write_bytes(gzip.compress(b'{"text": "a"}\n'))
    with pytest.raises(PreprocessError) as error:
        find_inputs(values, format)
    assert str(error.value).startswith(expected)


def test_text_that_holds_json_can_be_forced(folder: Path) -> None:
    (folder / "json.txt").write_bytes(b'{"text": "a"}\n')
    assert found("json.txt", format="text") == [("json.txt", "text")]
    assert found("json.txt", format="jsonl") == [("json.txt", "jsonl")]


@pytest.fixture
def flags(stub: Callable, tmp_path: Path) -> list[object]:
    stub(lambda text: None)
    return ["--output-prefix", tmp_path / "out"]


def test_text_has_one_key(refused: Callable[..., str], folder: Path, flags: list[object]) -> None:
    message = refused("--input", "d.txt", "--json-keys", "a", "b", *flags)
    assert "d.txt: plain text has no keys: give one --json-keys" in message


def test_partitions_need_files(refused: Callable[..., str], folder: Path, flags: list[object]) -> None:
    """A pipe can be read only once."""
    os.mkfifo("pipe")
    message = refused("--input", "pipe", "--partitions", 2, *flags)
    assert "--partitions reads the input once for each, so it cannot be a pipe" in message


def test_partitions_and_shards(refused: Callable[..., str], folder: Path, flags: list[object]) -> None:
    message = refused("--input", "b.jsonl", "--partitions", 2, "--shard", "0/2", *flags)
    assert "--partitions reorders the whole input, so it cannot go with --shard: drop one" in message
