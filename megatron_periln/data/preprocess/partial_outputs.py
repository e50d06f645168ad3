"""The datasets of a run while they are partial, in a folder from which a later run can resume.

The folder holds for each dataset the tokens and the lengths that workers write at their places, and
a journal with a line for each chunk that was written. A chunk counts when it, and all before it,
are in the journal and lie on the disk as the journal says; what else lies there is written again.
So nothing needs to be brought to the disk while the run lasts: checksums tell what a crash took.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from numpy.typing import NDArray

from megatron_periln.data.output_files import indented_json, writing
from megatron_periln.data.preprocess.encode import Part
from megatron_periln.data.preprocess.journal import (
    COMPLETE,
    Dataset,
    Placer,
    Record,
    Records,
    Replay,
    Size,
    bad_documents,
    is_complete,
    read_journal,
)
from megatron_periln.data.preprocess.plan import difference
from megatron_periln.data.readers.documents import BadDocument
from megatron_periln.errors import PreprocessError
from megatron_periln.files import sync, try_lock

__all__ = ["LOCK_SECONDS", "Location", "PartReader", "PartialOutputs", "write_part"]

LOCK_SECONDS = 5.0
"""How long to wait for another run to leave the folder."""

_SUFFIXES = (".bin", ".lengths", ".documents")
"""The files of a partial dataset: tokens, tokens in each sequence, sequences in each document."""


class Location(NamedTuple):
    """Where a chunk is written: a dataset, by the path of its files without suffix, and where in it."""

    stem: str
    start: Size


def write_part(location: Location, part: Part) -> int:
    """Write a chunk's part at its place; return its CRC-32.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    checksum = 0
    arrays: tuple[NDArray[Any], ...] = part
    for suffix, start, array in zip(_SUFFIXES, location.start, arrays, strict=True):
        data = memoryview(np.ascontiguousarray(array)).cast("B")
        checksum = zlib.crc32(data, checksum)
        descriptor = os.open(location.stem + suffix, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            at = start * array.itemsize
            while data:  # a write may fall short, as one that fills the disk does
                written = os.pwrite(descriptor, data, at)
                data, at = data[written:], at + written
        finally:
            os.close(descriptor)
    return checksum


def read_all(descriptor: int, size: int, offset: int) -> bytes:
    """Return ``size`` bytes of an open file, fewer at its end; the system gives 2 GiB at once at most."""
    data = os.pread(descriptor, size, offset)
    while len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
        data += more
    return data


class PartReader:
    """Reads what lies on the disk; a dataset's files stay open, for a run may have 10^5 chunks.

    Parameters
    ----------
    dtype
        The dtype of the tokens.
    """

    def __init__(self, dtype: np.dtype) -> None:
        self._itemsizes = (dtype.itemsize, np.dtype(np.int32).itemsize, np.dtype(np.int64).itemsize)
        self._open: dict[str, tuple[str, list[int]]] = {}

    def checksum(self, key: str, location: Location, size: Size) -> int | None:
        """Return the CRC-32 of what lies where a key's part was written; None if less lies there."""
        checksum = 0
        try:
            files = self._files(key, location.stem)
        except FileNotFoundError:
            return None
        for descriptor, start, length, itemsize in zip(
            files, location.start, size, self._itemsizes, strict=True
        ):
            data = read_all(descriptor, length * itemsize, start * itemsize)
            if len(data) < length * itemsize:
                return None
            checksum = zlib.crc32(data, checksum)
        return checksum

    def close(self) -> None:
        """Close the files."""
        for _, files in self._open.values():
            for descriptor in files:
                os.close(descriptor)
        self._open.clear()

    def _files(self, key: str, stem: str) -> list[int]:
        stem_before, files = self._open.get(key, ("", []))
        if stem_before != stem:
            while files:
                os.close(files.pop())
            self._open[key] = (stem, files)
            for suffix in _SUFFIXES:
                files.append(os.open(stem + suffix, os.O_RDONLY | os.O_CLOEXEC))
        return files


class PartialOutputs:
    """The partial datasets of one run.

    Parameters
    ----------
    folder
        Where they lie.
    dtype
        The dtype of the tokens.
    identity
        What decides the bytes; a run is resumed only by one with the same.
    max_bin_size
        As in ``Placer``.
    """

    def __init__(
        self, folder: Path, dtype: np.dtype, identity: dict[str, Any], max_bin_size: int | None = None
    ) -> None:
        self.folder = folder
        self.complete = False
        self.encoder: str | None = None
        """What a run that is resumed encodes with, where another encoder was found not to be exact."""
        self.dtype, self._max = dtype, max_bin_size
        self._identity = identity
        self._stems: dict[Dataset, str] = {}
        self._forget()
        self._journal: TextIO | None = None
        self._started = False
        self._lock: TextIO | None = None

    def _forget(self) -> None:
        self.records = Records()
        self._placer = self._new_placer()
        self._final = Replay(self._new_placer())
        self._seen_as_final = 0
        self._final_ends: dict[Dataset, Size] = {}
        """How much of the datasets was final when the run was resumed, until that is told."""

    def open(self, *, resume: bool, overwrite: bool) -> None:
        """Make the folder, or resume from what it holds.

        Raises
        ------
        PreprocessError
            If another run writes there, or there is a run that shall not, or cannot, be resumed.
        """
        there = self.folder.exists()
        if there and not resume and not overwrite:
            raise PreprocessError(
                f"{self.folder}: an unfinished run; go on with --resume or start anew with --overwrite"
            )
        with writing(self.folder):
            self.folder.mkdir(exist_ok=True)
            self._take_lock()
            if there and resume:
                self._resume()
            else:
                self._start()

    def place(self, sizes: dict[str, Size]) -> dict[str, Location]:
        """Return where the next chunk goes, for each key."""
        return self._locations(self._placer.place(sizes))

    def add(self, record: Record) -> None:
        """Note that a chunk was written.

        Raises
        ------
        PreprocessError
            If the journal cannot be written.
        """
        assert self._journal
        with writing(self.folder):
            self._journal.write(record.to_json())
            self._journal.flush()
        self.records.append(record)

    def stem(self, dataset: Dataset) -> str:
        """Return the path, without suffix, of a partial dataset's files."""
        if dataset not in self._stems:
            name = "{}_{:05d}".format(*dataset).replace("/", "%2F")
            self._stems[dataset] = str(self.folder / name)
        return self._stems[dataset]

    def datasets(self) -> dict[Dataset, Size]:
        """Return the size of each dataset."""
        return self._placer.ends

    def placed(self) -> Iterator[tuple[Record, dict[Dataset, Size]]]:
        """Yield each chunk that was written, in order, and where its parts begin."""
        return Replay(self._new_placer()).add(self.records)

    def newly_final(self) -> Iterator[tuple[str, int]]:
        """Yield the .bin files of which more is final than at the last call, and how many bytes are.

        Bytes are final when their chunk and all before it were written.
        """
        ends, self._final_ends = self._final_ends, {}
        new, self._seen_as_final = self.records[self._seen_as_final :], len(self.records)
        for record, starts in self._final.add(new):
            for dataset, start in starts.items():
                ends[dataset] = start + record.sizes[dataset[0]]
        for dataset, end in ends.items():
            yield f"{self.stem(dataset)}.bin", end.tokens * self.dtype.itemsize

    def bad_documents(self) -> Iterator[BadDocument]:
        """Yield the documents that go in quarantine, in order, from the disk."""
        return bad_documents(self.folder / "journal")

    def make_empty(self, keys: Iterable[str]) -> None:
        """Make the dataset of each key, as no chunk did."""
        with writing(self.folder):
            for location in self.place(dict.fromkeys(keys, Size(0, 0, 0))).values():
                for suffix in _SUFFIXES:
                    Path(location.stem + suffix).touch()

    def mark_complete(self) -> None:
        """Bring everything to the disk, and note that all chunks were written."""
        assert self._journal
        with writing(self.folder):
            # First the data, then the line: where a later run finds the line, it checks no data again.
            for dataset in self.datasets():
                for suffix in _SUFFIXES:
                    sync(Path(self.stem(dataset) + suffix))
            self._journal.write(COMPLETE + "\n")
            self._journal.flush()
            os.fsync(self._journal.fileno())
        self.complete = True

    def restart(self, encoder: str) -> None:
        """Forget everything that was written, and note the encoder that writes from now on."""
        assert self._journal
        self._journal.close()
        self.encoder = encoder
        self._forget()
        self._start()

    def close(self, *, remove: bool = False) -> None:
        """Let another run have the folder; remove it if asked to, or if it has no chunk."""
        if self._started:
            if self._journal:
                with suppress(OSError):  # of a full disk; what could not be written has been told
                    self._journal.close()
            if remove or not self.records:
                self._remove()
        if self._lock:
            self._lock.close()

    def _remove(self) -> None:
        # Under another name at once, so that what is left when this is cut off is no unfinished run.
        removed = self.folder.with_name(f"{self.folder.name}.removed")
        shutil.rmtree(removed, ignore_errors=True)
        try:
            self.folder.rename(removed)
        except OSError:
            removed = self.folder
        shutil.rmtree(removed, ignore_errors=True)

    def _take_lock(self) -> None:
        # Workers inherit the lock, so those of a run that was killed keep the folder until they end.
        self._lock = (self.folder / "lock").open("w")
        deadline = time.monotonic() + LOCK_SECONDS
        while try_lock(self._lock.fileno()) is False:
            if time.monotonic() > deadline:
                raise PreprocessError(f"{self.folder}: another run is writing here")
            time.sleep(0.05)

    def _start(self) -> None:
        self._started = True
        for path in self.folder.iterdir():
            if path.name != "lock":
                path.unlink()
        # What the journal is of is on the disk before there is one; without either, a run starts anew.
        with (self.folder / "run.json").open("wb") as stream:
            stream.writelines(indented_json({**self._identity, "encoder": self.encoder}))
        sync(self.folder / "run.json")
        self._journal = (self.folder / "journal").open("w", encoding="utf-8")
        sync(self.folder)

    def _resume(self) -> None:
        journal = self.folder / "journal"
        try:
            saved = json.loads((self.folder / "run.json").read_text())
            self.complete = is_complete(journal)
        except (FileNotFoundError, ValueError):  # ended before anything was written
            self._start()
            return
        if changed := difference(saved, self._identity):
            raise PreprocessError(
                f"{self.folder}: cannot go on: {changed}; run as before, or start anew with --overwrite"
            )
        self.encoder = saved.get("encoder")
        # Without a line that was cut off, and the chunks that will be written again.
        temporary = journal.with_suffix(".new")
        with temporary.open("wb") as stream:
            stream.writelines(self._keep_what_is_there(journal))
            stream.write(f"{COMPLETE}\n".encode() * self.complete)
        sync(temporary)
        temporary.replace(journal)
        self._journal = journal.open("a", encoding="utf-8")
        self._started = True

    def _keep_what_is_there(self, journal: Path) -> Iterator[bytes]:
        """Keep the chunks of a journal up to the first that does not lie on the disk; yield their lines."""
        lines: dict[int, bytes] = {}

        def records() -> Iterator[Record]:
            for record, line in read_journal(journal):
                lines[record.number] = line
                yield record

        with closing(PartReader(self.dtype)) as reader:
            for record, starts in Replay(self._new_placer()).add(records()):
                # What is complete may have its final name already.
                locations = {} if self.complete else self._locations(starts)
                if any(
                    reader.checksum(key, location, record.sizes[key]) != record.checksums[key]
                    for key, location in locations.items()
                ):
                    break
                self._placer.place(record.sizes)
                self.records.append(record)
                yield lines.pop(record.number)
        self._final = Replay(self._placer.copy(), len(self.records))
        self._seen_as_final, self._final_ends = len(self.records), dict(self._placer.ends)

    def _new_placer(self) -> Placer:
        return Placer(self.dtype, self._max)

    def _locations(self, starts: dict[Dataset, Size]) -> dict[str, Location]:
        return {dataset[0]: Location(self.stem(dataset), start) for dataset, start in starts.items()}
