"""Chunks of any size hold each line once, with its place."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_periln.data.readers import opening
from megatron_periln.data.readers.documents import Oversized, Place, PlainText, RawDocument
from megatron_periln.data.readers.inputs import find_inputs
from megatron_periln.data.readers.sources import Block, ByteRange, Chunk, LineStream, TextFiles
from megatron_periln.data.readers.tasks import cut_into_sources
from megatron_periln.errors import PreprocessError
from tests.data.compressions import COMPRESS, is_plain

LINE = st.one_of(
    st.binary(max_size=12), st.just(b""), st.just(b"\r"), st.integers(20, 90).map(lambda n: b"x" * n)
)
CONTENT = st.builds(
    lambda lines, end: b"\n".join(lines) + end, st.lists(LINE, max_size=12), st.sampled_from([b"", b"\n"])
).filter(is_plain)
CHUNK = st.integers(1, 60)
LIMIT = st.one_of(st.integers(0, 40), st.just(10_000))
READ = st.sampled_from([1, 7, 1 << 20])
CUTS = st.lists(st.integers(0, 400), max_size=4)
NUMBERS = count()
"""Of files: a range remembers how many lines its file has there, so each content has a file of its own."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sources")


def expected(path: Path, content: bytes, limit: int, *, numbered: bool) -> list[RawDocument]:
    lines = content.split(b"\n")
    if not lines[-1]:
        lines.pop()
    entries, offset = [], 0
    for number, line in enumerate(lines, 1):
        place = Place(str(path), offset, number if numbered else None)
        entries.append(RawDocument(place, line if len(line) <= limit else Oversized(len(line), limit)))
        offset += len(line) + 1
    return entries


def pieces(content: bytes, cuts: list[int]) -> Iterator[bytes]:
    ends = [*sorted(cuts), len(content)]
    for start, end in zip([0, *ends], ends, strict=False):
        yield content[start:end]


@given(content=CONTENT, chunk=CHUNK, limit=LIMIT, read=READ)
@example(content=b"x" * 500, chunk=7, limit=499, read=1)
@example(content=b"x" * 500 + b"\n", chunk=7, limit=500, read=7)
@example(content=b"\n\n\r\n", chunk=1, limit=0, read=1)
def test_ranges(folder: Path, content: bytes, chunk: int, limit: int, read: int) -> None:
    path = folder / f"in_{next(NUMBERS)}.jsonl"
    path.write_bytes(content)
    ranges = sources_of(path, chunk)
    assert sum(part.weight for part in ranges) == len(content)
    assert all(isinstance(part, ByteRange) and part.weight <= chunk for part in ranges)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "READ_BYTES", read)
        entries = [list(part.raw_documents(limit)) for part in ranges]
        assert [part.count() for part in ranges] == list(map(len, entries))
    assert [entry for part in entries for entry in part] == expected(path, content, limit, numbered=False)


def sources_of(path: Path, chunk: int) -> list[Chunk]:
    (file,) = find_inputs([str(path)])
    return [part for source in cut_into_sources([file], ["text"], chunk) for part in source.chunks(1000)]


@given(
    content=CONTENT, chunk=CHUNK, limit=LIMIT, read=READ, cuts=CUTS, kind=st.sampled_from(sorted(COMPRESS))
)
@example(content=b"x" * 500, chunk=7, limit=499, read=1, cuts=[], kind="")
@example(content=b"x" * 500 + b"\na", chunk=7, limit=10, read=7, cuts=[3], kind=".gz")
@settings(max_examples=200)
def test_streams(
    folder: Path, content: bytes, chunk: int, limit: int, read: int, cuts: list[int], kind: str
) -> None:
    """Compressed ones of several members or frames, some of them empty."""
    path = folder / f"stream{kind}"
    path.write_bytes(b"".join(map(COMPRESS[kind], pieces(content, cuts))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "READ_BYTES", read)
        blocks = list(LineStream(str(path), chunk, path.stat().st_size).chunks(limit))
    entries = [list(block.raw_documents(limit)) for block in blocks]
    assert [block.count() for block in blocks] == list(map(len, entries))
    assert [entry for part in entries for entry in part] == expected(path, content, limit, numbered=True)
    assert sum(block.weight for block in blocks) == (path.stat().st_size if content else 0)
    longest = max(limit, chunk)
    assert all(isinstance(block, Block) for block in blocks)
    assert all(len(block.data) <= longest + chunk for block in blocks if isinstance(block.data, bytes))


@pytest.mark.parametrize("suffix", [".txt", *(f".jsonl{suffix}" for suffix in COMPRESS)])
def test_memory_is_bounded(tmp_path: Path, suffix: str) -> None:
    """However large a document is: what is over the limit is counted, not kept."""
    content = b"x" * (40 << 20)
    path = tmp_path / f"in{suffix}"
    path.write_bytes(COMPRESS.get(path.suffix, bytes)(content))
    tracemalloc.start()
    try:
        found = [entry for part in sources_of(path, 1 << 20) for entry in part.raw_documents(1000)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [entry.content for entry in found] == [Oversized(len(content), 1000)]
    assert peak < 6 << 20


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".xz", ".bz2", ".lz4"])
@pytest.mark.parametrize("damage", ["cut off", "no end", "changed", "garbage"])
def test_broken_stream(tmp_path: Path, suffix: str, damage: str) -> None:
    """What can be read is read; then an error says after which line, and is never taken for the end."""
    content = b"".join(b"%d\n" % n for n in range(100_000))
    data = COMPRESS[suffix](content) * 2
    broken = {
        "cut off": data[: len(data) * 3 // 4],
        "no end": data[:-1],
        "changed": data[:-400] + bytes(400),
        "garbage": data + b"garbage",
    }[damage]
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(broken)
    read = 0
    with pytest.raises(PreprocessError) as error:
        for block in LineStream(str(path), 10_000, 0).chunks(1000):
            read += block.count()
    assert str(error.value).startswith(f"{path}: cannot be read (after line {read}): ")
    assert 98_000 < read <= 200_000


@given(
    contents=st.lists(st.binary(max_size=40).filter(is_plain), min_size=1, max_size=6),
    limit=st.integers(0, 50),
    read=READ,
)
def test_text_files(folder: Path, contents: list[bytes], limit: int, read: int) -> None:
    paths = [str(folder / f"{n}.txt") for n in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        Path(path).write_bytes(content)
    texts = TextFiles(tuple(paths), sum(map(len, contents)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "READ_BYTES", read)
        entries = list(texts.raw_documents(limit))
    assert texts.count() == len(entries)
    assert [entry.place for entry in entries] == [Place(path, 0, None) for path in paths]
    assert [entry.content for entry in entries] == [
        PlainText(content) if len(content) <= limit else Oversized(len(content), limit)
        for content in contents
    ]
