"""The journal, and the places of its chunks."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_periln.data.preprocess.journal import (
    Placer,
    Record,
    Replay,
    Size,
    bad_documents,
    copy_journal,
    read_journal,
)
from megatron_periln.data.readers.documents import BadDocument, Place

UINT16 = np.dtype(np.uint16)
SIZES = st.tuples(st.integers(0, 9), st.integers(0, 3), st.integers(0, 3)).map(lambda size: Size(*size))


BAD = st.builds(
    BadDocument,
    st.builds(Place, st.text(), st.none() | st.integers(0, 1 << 62), st.none() | st.integers(1, 1 << 62)),
    st.text(),
    st.text(),
    st.none() | st.binary().map(lambda data: data.decode("utf-8", "surrogateescape")),
)


RECORDS = st.lists(
    st.builds(
        Record,
        number=st.integers(0, 9),
        sizes=st.dictionaries(st.text(), SIZES),
        checksums=st.dictionaries(st.text(), st.integers(0, 1 << 32)),
        empty=st.dictionaries(st.text(), st.integers(0, 1 << 62)),
        bytes=st.integers(0, 1 << 62),
        weight=st.integers(0, 1 << 62),
        skipped=st.dictionaries(st.text(), st.integers(1, 1 << 62)),
        bad=st.lists(BAD, max_size=3),
    ),
    min_size=1,
    max_size=3,
    unique_by=lambda record: record.number,
)


@given(RECORDS, st.integers(1), st.integers(0, 9))
def test_journal(
    tmp_path_factory: pytest.TempPathFactory, records: list[Record], cut: int, chunks: int
) -> None:
    """Lines are read as they were written, or not at all if cut off; the documents only when asked for."""
    path = tmp_path_factory.mktemp("journal") / "journal"
    lines = [record.to_json() for record in records]
    text, kept = "".join(lines), {record.number: record.without_bad() for record in records}
    path.write_text(text)
    assert read_journal(path) == (list(kept.values()), False)
    ordered = sorted(records, key=lambda record: record.number)
    assert list(bad_documents(path)) == [document for record in ordered for document in record.bad]
    path.write_text(text + '"complete"\n')
    assert read_journal(path) == (list(kept.values()), True)
    copy_journal(path, path.with_name("copy"), chunks, complete=True)
    first = [line for record, line in zip(records, lines, strict=True) if record.number < chunks]
    assert path.with_name("copy").read_text() == "".join([*first, '"complete"\n'])
    path.write_text(text[:-1])  # without the end of the last line, which is whole all the same
    assert read_journal(path) == (list(kept.values()), False)
    path.write_text(text[: -2 - cut % (len(lines[-1]) - 2)])
    kept.pop(records[-1].number)
    assert read_journal(path) == (list(kept.values()), False)


@given(sizes=st.lists(SIZES, max_size=30), limit=st.one_of(st.none(), st.integers(1, 40)))
def test_places(sizes: list[Size], limit: int | None) -> None:
    """One behind the other; a dataset exceeds the limit only where a chunk alone does."""
    placer = Placer(UINT16, limit)
    chunks: dict[tuple[str, int], list[Size]] = {}
    for size in sizes:
        ((dataset, start),) = placer.place({"text": size}).items()
        before = chunks.setdefault(dataset, [])
        assert start == sum(before, Size(0, 0, 0))
        before.append(size)
    assert [size for key in sorted(chunks) for size in chunks[key]] == sizes
    assert sorted(chunks) == [("text", n) for n in range(len(chunks))]
    for dataset, found in chunks.items():
        assert placer.ends[dataset] == sum(found, Size(0, 0, 0))
        if limit is None:
            assert dataset[1] == 0
        else:
            with_tokens = [size for size in found if size.tokens]
            assert placer.ends[dataset].tokens * 2 <= limit or len(with_tokens) == 1
    assert all(placer.ends[dataset].tokens for dataset in sorted(chunks)[1:])


@given(
    sizes=st.lists(SIZES, max_size=30),
    limit=st.one_of(st.none(), st.integers(1, 40)),
    order=st.randoms(use_true_random=False),
    parts=st.integers(1, 5),
)
def test_replay(sizes: list[Size], limit: int | None, order: random.Random, parts: int) -> None:
    """In whatever order chunks become known, they are where the run placed them, each once all before are."""
    placer = Placer(UINT16, limit)
    placed = [placer.place({"text": size}) for size in sizes]
    records = [Record(n, {"text": size}, {}, {}, 0, 0) for n, size in enumerate(sizes)]
    shuffled = order.sample(records, len(records))
    replay, found = Replay(Placer(UINT16, limit)), []
    for part in range(parts):
        found += replay.add(shuffled[part::parts])
        known = {record.number for before in range(part + 1) for record in shuffled[before::parts]}
        assert len(found) == min(set(range(len(records) + 1)) - known)
    assert found == list(zip(records, placed, strict=True))


def test_names_in_the_journal() -> None:
    """They stay, so that a run of an earlier version can be resumed."""
    bad = BadDocument(Place("in.jsonl", 7, None), "not UTF-8", "why", "text")
    record = Record(3, {"text": Size(5, 2, 1)}, {"text": 9}, {"text": 0}, 10, 11, {"not UTF-8": 1}, [bad])
    line = (
        '{"number": 3, "sizes": {"text": [5, 2, 1]}, "checksums": {"text": 9}, "empty": {"text": 0}, '
        '"bytes": 10, "weight": 11, "left_out": {"not UTF-8": 1}, "bad": [{"place": ["in.jsonl", 7, null], '
        '"kind": "not UTF-8", "reason": "why", "content": "text"}]}\n'
    )
    assert record.to_json() == line
    assert Record.from_json(line) == record
    content = json.loads(line)
    content.pop("left_out")
    assert Record.from_json(json.dumps(content)) == record
