"""Rows of Parquet files."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from pyarrow.parquet import ParquetFile

from megatron_periln.data.readers.documents import Oversized, Place, RawDocument
from megatron_periln.data.readers.parquet import RowStream, row_ranges, streamed
from megatron_periln.data.readers.shared_buffers import borrow, lending
from megatron_periln.errors import PreprocessError


@pytest.fixture
def refused_rows(tmp_path: Path, stub: Callable, refused: Callable[..., str]) -> Callable[..., str]:
    stub(lambda text: None)

    def run_refused(columns: dict[str, Any], *flags: object) -> str:
        parquet.write_table(pa.table(columns), tmp_path / "in.parquet")
        return refused("--input", tmp_path / "in.parquet", "--output-prefix", tmp_path / "out", *flags)

    return run_refused


@pytest.mark.parametrize("range_bytes", [1, 5000, 1 << 25])
def test_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, range_bytes: int) -> None:
    """Cuts within row groups of many batches; places are rows of the file."""
    monkeypatch.setattr("megatron_periln.data.readers.parquet.RANGE_BYTES", range_bytes)
    rows = [{"text": f"{n} {'x' * (n % 50)}", "list": [str(n), "a"][: n % 3]} for n in range(1700)]
    path = str(tmp_path / "in.parquet")
    parquet.write_table(pa.Table.from_pylist([{"id": 1, **row} for row in rows]), path, row_group_size=800)
    ranges = row_ranges(path, ["list", "text"])
    pieces = {1: 1700, 5000: len(ranges), 1 << 25: 3}
    assert len(ranges) == pieces[range_bytes] > 2
    assert [part.count() for part in ranges] == [len(list(part.raw_documents(1000))) for part in ranges]
    entries = [entry for part in ranges for entry in part.raw_documents(1000)]
    assert entries == [RawDocument(Place(path, None, n), row) for n, row in enumerate(rows, 1)]
    assert 0 < sum(part.weight for part in ranges) <= Path(path).stat().st_size
    large = [n for n, row in enumerate(rows) if len(row["text"]) + sum(map(len, row["list"])) > 40]
    found = [entry.content for part in ranges for entry in part.raw_documents(40)]
    assert [n for n, content in enumerate(found) if isinstance(content, Oversized)] == large


@pytest.mark.parametrize("shard", [slice(None), slice(2, 7), slice(1)], ids=["all", "a shard", "one range"])
@pytest.mark.parametrize("range_bytes", [1000, 5000, 1 << 25])
def test_a_row_group_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, range_bytes: int, shard: slice
) -> None:
    monkeypatch.setattr("megatron_periln.data.readers.parquet.RANGE_BYTES", range_bytes)
    rows = [{"text": f"{n} {'x' * (n % 50)}", "list": [str(n), "a"][: n % 3]} for n in range(1700)]
    path = str(tmp_path / "in.parquet")
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=800)
    ranges = row_ranges(path, ["list", "text"])[shard]
    expected = [row for part in ranges for row in part.raw_documents(40)]
    read: list[int] = []
    read_group = ParquetFile.iter_batches

    def counting(self: Any, *given: Any, row_groups: list[int], **more: Any) -> Any:
        read.extend(row_groups)
        return read_group(self, *given, row_groups=row_groups, **more)

    monkeypatch.setattr(ParquetFile, "iter_batches", counting)
    with lending(3, 1 << 20):
        chunks = [chunk for source in streamed(ranges) for chunk in source.chunks(40)]
        assert sum(chunk.weight for chunk in chunks) == sum(part.weight for part in ranges)
        # Rows lie in shared memory as far as there is some: what goes to a worker says where.
        sent = [pickle.dumps(chunk) for chunk in chunks]
        if len(ranges) > len({part.group for part in ranges}):  # else workers read for themselves
            assert all(len(data) < 500 for data in sent[:3]) and len(chunks) > 3
        received = [list(pickle.loads(data).raw_documents(40)) for data in sent]
        assert [row for rows in received for row in rows] == expected
        assert [chunk.count() for chunk in chunks] == list(map(len, received))
    assert sorted(read) == sorted({part.group for part in ranges})


def test_shared_buffers_are_lent_again() -> None:
    with lending(2, 100):
        first, second = borrow(100), borrow(1)
        assert first and second and borrow(1) is None
        first.view[:] = b"a" * 100
        assert bytes(pickle.loads(pickle.dumps(first))) == b"a" * 100
        del first
        assert borrow(101) is None
        assert borrow(1)
    assert borrow(1) is None


def test_a_buffer_is_not_given_back_to_those_who_did_not_lend_it() -> None:
    with lending(1, 100):
        old = borrow(1)
    with lending(1, 100):
        del old
        first = borrow(1)
        assert first and borrow(1) is None


@pytest.mark.parametrize(
    "kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_kinds_of_strings(tmp_path: Path, kind: pa.DataType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a library calls them: pandas' categories, the views of polars."""
    path, texts, lists = str(tmp_path / "in.parquet"), ["a", "", None, "a"], [["a", "b"], [], None, ["b"]]
    parquet.write_table(
        pa.table({"text": pa.array(texts, kind), "list": pa.array(lists, pa.list_(kind))}), path
    )
    entries = [entry for part in row_ranges(path, ["text", "list"]) for entry in part.raw_documents(1000)]
    assert [entry.content for entry in entries] == [
        {"text": text, "list": list_} for text, list_ in zip(texts, lists, strict=True)
    ]
    monkeypatch.setattr("megatron_periln.data.readers.parquet.RANGE_BYTES", 1)
    (stream,) = streamed(row_ranges(path, ["text", "list"]))
    assert isinstance(stream, RowStream)
    assert [entry for chunk in stream.chunks(1000) for entry in chunk.raw_documents(1000)] == entries


def test_no_rows(tmp_path: Path) -> None:
    path = str(tmp_path / "in.parquet")
    parquet.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    assert row_ranges(path, ["text"]) == []


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.list_(pa.string())])
def test_columns_of_texts(tmp_path: Path, kind: Any) -> None:
    path = str(tmp_path / "in.parquet")
    value = ["a"] if pa.types.is_list(kind) else "a"
    parquet.write_table(pa.table({"text": pa.array([value], kind)}), path)
    (part,) = row_ranges(path, ["text"])
    assert [entry.content for entry in part.raw_documents(10)] == [{"text": value}]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1], "int64"),
        ([b"a"], "binary"),
        ([[1]], "list<element: int64>"),
        ([{"a": "b"}], "struct<a: string>"),
    ],
)
def test_columns_of_something_else(refused_rows: Callable[..., str], values: list[Any], kind: str) -> None:
    message = refused_rows({"text": values})
    assert f"in.parquet: column 'text' has {kind}; it must be strings or lists of strings" in message


def test_missing_column(refused_rows: Callable[..., str]) -> None:
    message = refused_rows({"body": ["a"], "id": [1]})
    assert "in.parquet: no column 'text'; the columns there are: 'body', 'id'; choose with" in message


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["a", None], "in.parquet:2: key 'text' has null; it must be a string"),
        ([["a"], ["b", None]], "in.parquet:2: key 'text' has a list with null;"),
    ],
)
def test_nulls(refused_rows: Callable[..., str], values: list[Any], expected: str) -> None:
    assert expected in refused_rows({"text": values})


def test_not_parquet(tmp_path: Path) -> None:
    (tmp_path / "in.parquet").write_text("text")
    with pytest.raises(PreprocessError, match=r"in.parquet: cannot be read: .*[Pp]arquet"):
        row_ranges(str(tmp_path / "in.parquet"), ["text"])


def broken_text(values: list[bytes], *, lists: bool) -> pa.Array:
    """Return strings that are not UTF-8, which Parquet stores as they are."""
    array = pa.array(values, pa.binary())
    text = pa.Array.from_buffers(pa.string(), len(array), array.buffers())
    return pa.ListArray.from_arrays(list(range(len(array) + 1)), text) if lists else text


@pytest.mark.parametrize("lists", [False, True])
def test_not_utf8(
    tmp_path: Path, refused_rows: Callable[..., str], run: Callable[..., tuple[int, str]], lists: bool
) -> None:
    columns = {"text": broken_text([b"ok", b"a\xff", "é".encode()], lists=lists)}
    message = refused_rows(columns)
    assert "in.parquet:2: not UTF-8 at byte 2 of the value: invalid start byte" in message
    flags = ["--output-prefix", tmp_path / "out", "--on-error", "quarantine"]
    code, stderr = run("--input", tmp_path / "in.parquet", *flags)
    assert code == 0, stderr
    (entry,) = map(json.loads, (tmp_path / "out_quarantine.jsonl").read_text().splitlines())
    assert (entry["number"], entry["byte"], entry["kind"]) == (2, None, "not UTF-8")
    value = json.loads(entry["content"])["text"]
    assert (value[0] if lists else value).encode(errors="surrogateescape") == b"a\xff"
    assert (tmp_path / "out_text_document.bin").read_bytes() == b"o\0k\0\xe9\0"
