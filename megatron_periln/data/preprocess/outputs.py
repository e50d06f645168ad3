"""The datasets of a run while they grow, in a folder that a later run can take up.

The folder holds for each dataset the tokens and the lengths that workers write at their places, and
a journal with a line for each chunk that was written. A chunk counts when it, and all before it,
are in the journal and lie on the disk as the journal says; what else lies there is written again.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from megatron_periln.data.output_files import writing
from megatron_periln.data.preprocess.journal import (
    COMPLETE,
    SUFFIXES,
    Location,
    Record,
    Size,
    bad_documents,
    checksum_of,
    copy_journal,
    read_journal,
)
from megatron_periln.data.preprocess.placer import Dataset, Placer
from megatron_periln.data.preprocess.plan import difference
from megatron_periln.data.readers.documents import BadDocument
from megatron_periln.errors import PreprocessError
from megatron_periln.files import sync, try_lock

__all__ = ["Outputs"]

_LOCK_SECONDS = 5.0


class Outputs:
    """The growing datasets of one run.

    Parameters
    ----------
    folder
        Where they lie.
    dtype
        The dtype of the tokens.
    identity
        What decides the bytes; a run is taken up only by one with the same.
    max_bin_size
        As in ``Placer``.
    """

    def __init__(
        self, folder: Path, dtype: np.dtype, identity: dict[str, Any], max_bin_size: int | None = None
    ) -> None:
        self.folder = folder
        self.records: list[Record] = []
        self.complete = False
        self.encoder: str | None = None
        """What a run that was taken up encodes with, where another encoder was found not to be exact."""
        self.dtype, self._max = dtype, max_bin_size
        self._identity = identity
        self._placer = self.new_placer()
        self._journal: TextIO | None = None
        self._started = False
        self._lock: TextIO | None = None

    def open(self, *, resume: bool, overwrite: bool) -> None:
        """Make the folder, or take up what it holds.

        Raises
        ------
        PreprocessError
            If another run writes there, or there is a run that shall not, or cannot, be taken up.
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
                self._take_up()
            else:
                self._start()

    def new_placer(self) -> Placer:
        """Return what places chunks as this run does, from the first."""
        return Placer(self.dtype, self._max)

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
        self.records.append(record.without_bad())

    def stem(self, dataset: Dataset) -> str:
        """Return the path, without suffix, of a growing dataset's files."""
        return str(self.folder / "{}_{:05d}".format(*dataset).replace("/", "%2F"))

    def datasets(self) -> dict[Dataset, Size]:
        """Return the size of each dataset."""
        return self._placer.ends

    def placed(self) -> Iterator[tuple[Record, dict[Dataset, Size]]]:
        """Yield each chunk that was written, in order, and where its parts begin."""
        placer = self.new_placer()
        for record in sorted(self.records, key=lambda record: record.number):
            yield record, placer.place(record.sizes)

    def bad(self) -> Iterator[BadDocument]:
        """Yield the documents that go in quarantine, in order, from the disk."""
        return bad_documents(self.folder / "journal")

    def make_empty(self, keys: Iterable[str]) -> None:
        """Make the dataset of each key, as no chunk did."""
        with writing(self.folder):
            for location in self.place(dict.fromkeys(keys, Size(0, 0, 0))).values():
                for suffix in SUFFIXES:
                    Path(location.stem + suffix).touch()

    def end(self) -> None:
        """Bring everything to the disk, and note that all chunks were written."""
        assert self._journal
        with writing(self.folder):
            for dataset in self.datasets():
                for suffix in SUFFIXES:
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
        self.records, self._placer = [], self.new_placer()
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
        deadline = time.monotonic() + _LOCK_SECONDS
        while try_lock(self._lock.fileno()) is False:
            if time.monotonic() > deadline:
                raise PreprocessError(f"{self.folder}: another run is writing here")
            time.sleep(0.05)

    def _start(self) -> None:
        self._started = True
        for path in self.folder.iterdir():
            if path.name != "lock":
                path.unlink()
        (self.folder / "run.json").write_text(
            json.dumps({**self._identity, "encoder": self.encoder}, indent=2)
        )
        sync(self.folder / "run.json")
        self._journal = (self.folder / "journal").open("w", encoding="utf-8")
        sync(self.folder)

    def _take_up(self) -> None:
        journal = self.folder / "journal"
        try:
            saved = json.loads((self.folder / "run.json").read_text())
            found, self.complete = read_journal(journal)
        except (FileNotFoundError, ValueError):  # ended before anything was written
            self._start()
            return
        if changed := difference(saved, self._identity):
            raise PreprocessError(
                f"{self.folder}: cannot go on: {changed}; run as before, or start anew with --overwrite"
            )
        self.encoder = saved.get("encoder")
        self._keep_what_is_there(found)
        temporary = journal.with_suffix(".new")
        copy_journal(journal, temporary, len(self.records), complete=self.complete)
        temporary.replace(journal)
        self._journal = journal.open("a", encoding="utf-8")
        self._started = True

    def _keep_what_is_there(self, found: dict[int, Record]) -> None:
        """Keep the chunks of a journal up to the first that does not lie on the disk as it says."""
        trial = self.new_placer()
        while record := found.get(len(self.records)):
            # What is complete may have its final name already.
            locations = {} if self.complete else self._locations(trial.place(record.sizes))
            for key, location in locations.items():
                if checksum_of(location, record.sizes[key], self.dtype) != record.checksums[key]:
                    return
            self._placer.place(record.sizes)
            self.records.append(record)

    def _locations(self, starts: dict[Dataset, Size]) -> dict[str, Location]:
        return {dataset[0]: Location(self.stem(dataset), start) for dataset, start in starts.items()}
