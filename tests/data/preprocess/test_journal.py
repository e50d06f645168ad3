"""A line of the journal, and the bytes that it speaks of."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_periln.data.preprocess.encode import Part
from megatron_periln.data.preprocess.journal import (
    Location,
    Record,
    Size,
    bad_documents,
    checksum_of,
    copy_journal,
    read_journal,
    write_part,
)
from megatron_periln.data.readers.documents import BadDocument, Place

UINT16 = np.dtype(np.uint16)
SIZES = st.tuples(st.integers(0, 9), st.integers(0, 3), st.integers(0, 3)).map(lambda size: Size(*size))


BAD = st.builds(
    BadDocument,
    st.builds(Place, st.text(), st.none() | st.integers(0), st.none() | st.integers(1)),
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
        empty=st.dictionaries(st.text(), st.integers(0)),
        bytes=st.integers(0),
        weight=st.integers(0),
        left_out=st.dictionaries(st.text(), st.integers(1)),
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
    assert read_journal(path) == (kept, False)
    ordered = sorted(records, key=lambda record: record.number)
    assert list(bad_documents(path)) == [document for record in ordered for document in record.bad]
    path.write_text(text + '"complete"\n')
    assert read_journal(path) == (kept, True)
    copy_journal(path, path.with_name("copy"), chunks, complete=True)
    first = [line for record, line in zip(records, lines, strict=True) if record.number < chunks]
    assert path.with_name("copy").read_text() == "".join([*first, '"complete"\n'])
    path.write_text(text[: -1 - cut % (len(lines[-1]) - 1)])
    kept.pop(records[-1].number)
    assert read_journal(path) == (kept, False)


def test_writes_that_fall_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, at: pwrite(descriptor, data[:3], at))
    part = Part(np.arange(9, dtype=np.uint16), np.array([4, 5], np.int32), np.array([2], np.int64))
    location = Location(str(tmp_path / "out"), Size(2, 1, 0))
    checksum = write_part(location, part)
    assert checksum == checksum_of(location, Size(9, 2, 1), UINT16)
    assert np.fromfile(tmp_path / "out.bin", np.uint16).tolist() == [0, 0, *range(9)]
    assert np.fromfile(tmp_path / "out.lengths", np.int32).tolist() == [0, 4, 5]
    assert np.fromfile(tmp_path / "out.documents", np.int64).tolist() == [2]
