"""Small inputs read together."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_periln.data.readers.documents import PlainText
from megatron_periln.data.readers.inputs import find_inputs
from megatron_periln.data.readers.sources import ByteRange, Source, TextFiles
from megatron_periln.data.readers.tasks import cut_into_sources, to_tasks
from megatron_periln.data.readers.together import SmallSources, together

NUMBERS = count()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("small")


def documents(sources: list[Source], partitions: int) -> list[object]:
    tasks = to_tasks(sources, partitions, 1000)
    return [
        (entry.place.path, entry.content.data if isinstance(entry.content, PlainText) else entry.content)
        for task in tasks
        for entry in list(task.chunk.raw_documents(1000))[task.skip :: task.step]
    ]


@given(
    contents=st.lists(
        st.tuples(
            st.sampled_from([".jsonl", ".jsonl.gz", ".txt"]), st.lists(st.sampled_from([b"", b"a", b"b" * 9]))
        ),
        max_size=6,
    ),
    chunk=st.integers(1, 60),
    partitions=st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_the_same_documents_in_the_same_order(
    folder: Path, contents: list[tuple[str, list[bytes]]], chunk: int, partitions: int
) -> None:
    paths, example = [], next(NUMBERS)
    for n, (suffix, lines) in enumerate(contents):
        path = folder / f"{example}_{n}{suffix}"
        data = b"".join(line + b"\n" for line in lines)
        path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
        paths.append(str(path))
    sources = cut_into_sources(find_inputs(paths), ["text"], chunk)
    joined = together(sources, chunk)
    assert documents(joined, partitions) == documents(sources, partitions)
    assert sum(source.weight for source in joined) == sum(source.weight for source in sources)
    assert all(source.weight <= chunk for source in joined if isinstance(source, SmallSources))


def test_ten_thousand_small_files_are_a_few_chunks() -> None:
    sources: list[Source] = [ByteRange(str(n), 0, 50) for n in range(10_000)]
    tasks = list(to_tasks(together(sources, 1 << 20), 1, 1000))
    assert len(tasks) < 50
    assert sum(task.chunk.weight for task in tasks) == 500_000


def test_large_files_are_read_by_themselves() -> None:
    large: list[Source] = [ByteRange(str(n), 0, 100) for n in range(3)]
    assert together(large, 100) == large
    assert together([*large, TextFiles(("text",), 100)], 100) == [*large, TextFiles(("text",), 100)]


def test_what_is_decompressed_counts_as_large_as_it_is(folder: Path) -> None:
    """A few bytes of a compressed file may be many: memory is bounded by what was read."""
    paths = [folder / f"zeros_{n}.jsonl.gz" for n in range(8)]
    for path in paths:
        path.write_bytes(gzip.compress((b"0" * 999 + b"\n") * 100))
    (source,) = together(cut_into_sources(find_inputs(list(map(str, paths))), ["text"], 120_000), 120_000)
    assert isinstance(source, SmallSources)
    assert [chunk.count() for chunk in source.chunks(1000)] == [100] * 8
