"""The folder of partial datasets: what is written there, and what a later run finds of it."""

from __future__ import annotations

import errno
import json
import os
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_periln.data.preprocess import partial_outputs
from megatron_periln.data.preprocess.encode import Part
from megatron_periln.data.preprocess.journal import Record, Size
from megatron_periln.data.preprocess.partial_outputs import (
    Location,
    PartialOutputs,
    PartReader,
    write_part,
)
from megatron_periln.errors import PreprocessError

UINT16 = np.dtype(np.uint16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "out.partial"


def open_outputs(
    folder: Path, *, resume: bool = False, overwrite: bool = False, **identity: Any
) -> PartialOutputs:
    outputs = PartialOutputs(folder, UINT16, {"--append-eod": False, **identity})
    outputs.open(resume=resume, overwrite=overwrite)
    return outputs


def write(outputs: PartialOutputs, number: int, *, place: bool = True) -> None:
    """Write a chunk of two documents."""
    tokens = np.full(3, number, np.uint16)
    part = Part(tokens, np.array([1, 2], np.int32), np.array([1, 1], np.int64))
    sizes = {"text": Size(*map(len, part))}
    checksum = write_part(outputs.place(sizes)["text"], part)
    outputs.add(Record(number, sizes, {"text": checksum}, {"text": 0}, 10, 10))


@pytest.fixture
def four_chunks(folder: Path) -> Path:
    """An unfinished run with four chunks, in its folder."""
    outputs = open_outputs(folder)
    for number in range(4):
        write(outputs, number)
    outputs.close()
    return folder


def kept(folder: Path) -> list[int]:
    """Return the chunks that another run finds; end it without writing."""
    outputs = open_outputs(folder, resume=True)
    numbers = [record.number for record in outputs.records]
    size = Size(3, 2, 2)
    assert outputs.place({"text": size})["text"].start == Size(*(len(numbers) * n for n in size))
    outputs.close()
    return numbers


def test_nothing_is_lost(four_chunks: Path) -> None:
    assert kept(four_chunks) == [0, 1, 2, 3]
    assert kept(four_chunks) == [0, 1, 2, 3]


@pytest.mark.parametrize("suffix", [".bin", ".lengths", ".documents"])
@pytest.mark.parametrize("damage", ["missing", "short", "changed"])
def test_what_is_not_on_the_disk_is_written_again(four_chunks: Path, suffix: str, damage: str) -> None:
    """As after a power failure: a chunk counts when its bytes lie there, and those of all before it."""
    path = four_chunks / f"text_00000{suffix}"
    data = bytearray(path.read_bytes())
    chunk = len(data) // 4
    match damage:
        case "missing":
            path.unlink()
        case "short":
            path.write_bytes(data[: 3 * chunk - 1])
        case "changed":
            data[2 * chunk + 1] ^= 1
            path.write_bytes(data)
    assert kept(four_chunks) == ([] if damage == "missing" else [0, 1])


@pytest.mark.parametrize(
    "end", [b'{"number": 4, "siz', b"\0" * 100, b"\xff\xfe", b"[]\n", b'{"number": 4}\n']
)
def test_journal_that_is_cut_off(four_chunks: Path, end: bytes) -> None:
    with (four_chunks / "journal").open("ab") as journal:
        journal.write(end)
    assert kept(four_chunks) == [0, 1, 2, 3]
    outputs = open_outputs(four_chunks, resume=True)
    write(outputs, 4)
    outputs.close()
    assert kept(four_chunks) == [0, 1, 2, 3, 4]


def test_a_line_is_missing(four_chunks: Path) -> None:
    journal = four_chunks / "journal"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join([lines[3], lines[0], lines[1]]))  # as fast workers write them
    assert kept(four_chunks) == [0, 1]


@pytest.mark.parametrize("missing", ["journal", "run.json"])
def test_ended_before_anything_was_written(four_chunks: Path, missing: str) -> None:
    (four_chunks / missing).unlink()
    assert not open_outputs(four_chunks, resume=True).records
    assert not (four_chunks / "text_00000.bin").exists()


def test_description_that_is_cut_off(four_chunks: Path) -> None:
    (four_chunks / "run.json").write_text("{")
    assert not open_outputs(four_chunks, resume=True).records


def test_refused_without_a_flag(four_chunks: Path) -> None:
    with pytest.raises(
        PreprocessError, match="an unfinished run; go on with --resume or start anew with --overwrite"
    ):
        open_outputs(four_chunks)
    assert kept(four_chunks) == [0, 1, 2, 3]


def test_started_anew(four_chunks: Path) -> None:
    outputs = open_outputs(four_chunks, overwrite=True)
    assert not outputs.records
    assert sorted(path.name for path in four_chunks.iterdir()) == ["journal", "lock", "run.json"]


def test_refused_where_something_else_was_asked_for(four_chunks: Path) -> None:
    outputs = PartialOutputs(four_chunks, UINT16, {"--append-eod": True})
    with pytest.raises(PreprocessError, match="cannot go on: --append-eod was False and is True; run as bef"):
        outputs.open(resume=True, overwrite=False)
    outputs.close()
    assert kept(four_chunks) == [0, 1, 2, 3]


@pytest.mark.parametrize("flags", [{"resume": True}, {"overwrite": True}])
def test_another_run_is_writing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, bool]
) -> None:
    monkeypatch.setattr(partial_outputs, "LOCK_SECONDS", 0.1)
    outputs = open_outputs(folder)
    write(outputs, 0)
    second = PartialOutputs(folder, UINT16, {"--append-eod": False})
    with pytest.raises(PreprocessError, match="another run is writing here"):
        second.open(**{"resume": False, "overwrite": False, **flags})
    second.close(remove=True)
    write(outputs, 1)
    outputs.close()
    assert kept(folder) == [0, 1]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_without_locks(folder: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """On a file system that has none the run goes on."""

    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    outputs = open_outputs(folder)
    write(outputs, 0)
    outputs.close()
    assert kept(folder) == [0]


def test_locks_that_fail(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(PreprocessError, match="cannot be written: broken"):
        open_outputs(folder)


@pytest.mark.parametrize("renamed", [True, False])
def test_removed(folder: Path, monkeypatch: pytest.MonkeyPatch, renamed: bool) -> None:
    if not renamed:
        monkeypatch.setattr(os, "rename", lambda source, target: os.mkdir(source))  # noqa: PTH102 (fails)
    outputs = open_outputs(folder)
    write(outputs, 0)
    outputs.close(remove=True)
    assert list(folder.parent.iterdir()) == []


def test_nothing_is_left_without_a_chunk(folder: Path) -> None:
    open_outputs(folder).close()
    assert list(folder.parent.iterdir()) == []


def test_encoder_of_a_restart(folder: Path) -> None:
    outputs = open_outputs(folder)
    assert outputs.encoder is None
    write(outputs, 0)
    outputs.restart("tokenizers")
    assert not outputs.records
    write(outputs, 0)
    outputs.close()
    assert json.loads((folder / "run.json").read_text())["encoder"] == "tokenizers"
    outputs = open_outputs(folder, resume=True)
    assert outputs.encoder == "tokenizers"
    assert len(outputs.records) == 1


def test_keys_of_any_name(tmp_path: Path) -> None:
    outputs = PartialOutputs(tmp_path / "partial", UINT16, {})
    stems = {outputs.stem((key, 0)) for key in ("a/b", "a", "..", "journal", "lock")}
    assert len(stems) == 5
    assert {Path(stem).parent for stem in stems} == {tmp_path / "partial"}


def test_writes_that_fall_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, at: pwrite(descriptor, data[:3], at))
    part = Part(np.arange(9, dtype=np.uint16), np.array([4, 5], np.int32), np.array([2], np.int64))
    location = Location(str(tmp_path / "out"), Size(2, 1, 0))
    checksum = write_part(location, part)
    with closing(PartReader(UINT16)) as reader:
        assert checksum == reader.checksum("text", location, Size(9, 2, 1))
    assert np.fromfile(tmp_path / "out.bin", np.uint16).tolist() == [0, 0, *range(9)]
    assert np.fromfile(tmp_path / "out.lengths", np.int32).tolist() == [0, 4, 5]
    assert np.fromfile(tmp_path / "out.documents", np.int64).tolist() == [2]
