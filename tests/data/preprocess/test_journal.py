"""The journal, and the places of its chunks."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_periln.data.preprocess.journal import (
    Placer,
    Record,
    Records,
    Replay,
    Size,
    bad_documents,
    is_complete,
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


@given(RECORDS, st.integers(1))
def test_journal(tmp_path_factory: pytest.TempPathFactory, records: list[Record], cut: int) -> None:
    """Lines are read as they were written, or not at all if cut off."""
    path = tmp_path_factory.mktemp("journal") / "journal"
    lines = [record.to_json() for record in records]
    text = "".join(lines)
    expected = list(zip(records, map(str.encode, lines), strict=True))
    path.write_text(text)
    assert list(read_journal(path)) == expected
    assert not is_complete(path)
    ordered = sorted(records, key=lambda record: record.number)
    assert list(bad_documents(path)) == [document for record in ordered for document in record.bad]
    path.write_text(text + '"complete"\n')
    assert list(read_journal(path)) == expected
    assert is_complete(path)
    path.write_text(text[:-1])  # without the end of the last line, which is whole all the same
    assert list(read_journal(path)) == expected
    path.write_text(text[: -2 - cut % (len(lines[-1]) - 2)])
    assert list(read_journal(path)) == expected[:-1]
    assert not is_complete(path)


@given(RECORDS)
def test_records_are_kept_as_numbers(records: list[Record]) -> None:
    """Without the documents that were skipped."""
    kept, expected = Records(), []
    for record in records:
        record = replace(
            record,
            sizes={"a": Size(1, 2, 3), "b": Size(0, 0, record.number)},
            checksums={"a": 1 << 32, "b": 2},
            empty={"a": 5, "b": 0},
            bytes=record.bytes >> 2,
        )
        kept.append(record)
        expected.append(replace(record, bad=[]))
    assert list(kept) == expected == kept[:] and kept[-1] == expected[-1] and len(kept) == len(records)
    total = kept.total()
    assert (total.number, total.bytes) == (len(records), sum(record.bytes for record in expected))
    assert total.sizes == {
        "a": Size(*(len(records) * size for size in (1, 2, 3))),
        "b": Size(0, 0, sum(record.number for record in expected)),
    }
    assert total.skipped == sum((Counter(record.skipped) for record in expected), Counter())
    assert Records().total() == Record(0, {}, {}, {}, 0, 0)


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
