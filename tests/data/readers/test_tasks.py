"""Documents in the order of the output, and shards of the input."""

from __future__ import annotations

import gzip
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_periln.data.readers.inputs import InputFile
from megatron_periln.data.readers.sources import ByteRange, TextFiles
from megatron_periln.data.readers.tasks import Task, cut_into_sources, take_shard, to_tasks
from tests.data.compressions import is_plain

NUMBERS = count()
"""Of examples, each with files of its own."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tasks")


def plain(lines: list[bytes]) -> bool:
    return is_plain(b"".join(line + b"\n" for line in lines))


@given(
    contents=st.lists(
        st.lists(st.binary(max_size=8).filter(lambda line: b"\n" not in line)).filter(plain), max_size=4
    ),
    chunk=st.integers(1, 60),
    partitions=st.integers(2, 5),
)
def test_partitions(folder: Path, contents: list[list[bytes]], chunk: int, partitions: int) -> None:
    """Documents are dealt out over all files, compressed and not, as Megatron-LM does."""
    inputs, documents, example = [], [], next(NUMBERS)
    for n, lines in enumerate(contents):
        path = folder / f"dealt_{example}_{n}.jsonl{'.gz' if n % 2 else ''}"
        data = b"".join(line + b"\n" for line in lines)
        path.write_bytes(gzip.compress(data) if n % 2 else data)
        inputs.append(InputFile(str(path), "jsonl", path.stat().st_size))
        documents += lines
    found = [
        entry.content
        for task in to_tasks(cut_into_sources(inputs, ["text"], chunk), partitions, 1000)
        for entry in list(task.chunk.raw_documents(1000))[task.skip :: task.step]
    ]
    assert found == [line for n in range(partitions) for line in documents[n::partitions]]


@given(weights=st.lists(st.integers(0, 50), max_size=20), shards=st.integers(1, 8))
def test_shards(weights: list[int], shards: int) -> None:
    """They are all of the input, in order."""
    sources = [TextFiles((str(n),), weight) for n, weight in enumerate(weights)]
    parts = [take_shard(sources, shard, shards) for shard in range(shards)]
    assert [source for part in parts for source in part] == sources


def test_shards_are_even() -> None:
    sources = [ByteRange("file", n, n + 1) for n in range(1000)]
    assert [len(take_shard(sources, shard, 8)) for shard in range(8)] == [125] * 8


def test_tasks_of_one_partition_are_whole() -> None:
    part = ByteRange("file", 0, 1)
    assert list(to_tasks([part, part], 1, 10)) == [Task(part), Task(part)]


def test_sizes_of_texts_are_added_up_once() -> None:
    """However many of them are less than a chunk."""

    class File:
        format = "text"
        asked = 0

        def __init__(self, number: int) -> None:
            self.path = f"{number}.txt"

        @property
        def bytes(self) -> int:
            File.asked += 1
            return 1

    (texts, rest) = cut_into_sources([File(number) for number in range(300)], ["text"], 200)  # type: ignore[misc]
    assert isinstance(texts, TextFiles)
    assert isinstance(rest, TextFiles)
    assert [(len(part.paths), part.weight) for part in (texts, rest)] == [(200, 200), (100, 100)]
    assert File.asked == 300
