"""Worker processes that encode and write chunks, in bounded memory, and whose death costs a chunk.

Each worker has a pipe of its own, so no lock, queue or thread is shared with one that dies: its
pipe ends, even in the middle of a message. Tokens don't pass through the pipes: a worker reports
how many it has, learns where they go once all chunks before are known, and writes them there.

    parent                                        worker
    Task: what to read                     ->     encodes it
    asks the checker for their ids         <-     RareTexts, if it meets some
    ids                                    ->     goes on
    has the checker look at its samples,
    places it behind the chunks before     <-     Report: how much it has, or a PreprocessError
    locations: where to write              ->     writes it
    journal                                <-     Done: checksums of what it wrote, or a PreprocessError
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from megatron_periln.data.preprocess.checker import Check, Checker
from megatron_periln.data.preprocess.encode import ChunkEncoder, EncodedChunk, Part, Sample
from megatron_periln.data.preprocess.journal import Size
from megatron_periln.data.preprocess.partial_outputs import Location, write_part
from megatron_periln.data.preprocess.processes import cause_of_death, fork
from megatron_periln.data.preprocess.rare_texts import Inbox, RareTexts, RareTextsEncoder
from megatron_periln.data.readers.documents import BadDocument
from megatron_periln.data.readers.shared_buffers import lending
from megatron_periln.data.readers.tasks import Task
from megatron_periln.data.tokenizers.encoders import Encoded
from megatron_periln.errors import PreprocessError

__all__ = ["Report", "Written", "encode_and_write"]

# What bounds the memory while one chunk takes long: the chunks that are read and not written yet, and those
# of them whose tokens a worker keeps until it learns where they go.
_OUTSTANDING_PER_WORKER = 4
_HELD_PER_WORKER = 2

_BUFFER_BYTES = 24 << 20
"""Of what this process reads for the workers, at once, that which is larger goes through their pipes."""

_DEATHS = 3
"""Workers that die with the same chunk, after which the run ends."""


@dataclass(frozen=True)
class Report:
    """What a worker says about a chunk that it has encoded.

    Parameters
    ----------
    sizes
        For each key, how much it has.
    empty
        For each key, its documents without tokens.
    bytes, skipped, bad, samples
        As in ``EncodedChunk``.
    """

    sizes: dict[str, Size]
    empty: dict[str, int]
    bytes: int
    skipped: dict[str, int]
    bad: list[BadDocument]
    samples: list[Sample]

    @classmethod
    def of(cls, chunk: EncodedChunk) -> Report:
        """Describe ``chunk``."""
        sizes = {key: Size(*map(len, part)) for key, part in chunk.parts.items()}
        empty = {key: part.empty for key, part in chunk.parts.items()}
        return cls(sizes, empty, chunk.bytes, chunk.skipped, chunk.bad, chunk.samples)


@dataclass(frozen=True)
class _Done:
    """What a worker says about a chunk that it has written, or why it could not write it."""

    number: int
    checksums: dict[str, int] | PreprocessError


@dataclass(frozen=True)
class Written:
    """A chunk that was written.

    Parameters
    ----------
    number
        Its number.
    task
        What it was.
    report
        What it has.
    checksums
        For each key, the CRC-32 of what was written.
    """

    number: int
    task: Task
    report: Report
    checksums: dict[str, int]


def encode_and_write(
    encoder: ChunkEncoder,
    tasks: Iterable[Task],
    place: Callable[[Report], dict[str, Location]],
    workers: int,
    *,
    checker: Checker | None = None,
    first: int = 0,
    warn: Callable[[str], None] = lambda message: None,
) -> Generator[Written]:
    """Encode chunks in worker processes, which write them; yield each once it is written.

    Workers are forked, so that each shares the tokenizer built here instead of building its own.
    ``tasks`` is read only a few chunks ahead of what was written.

    Parameters
    ----------
    encoder
        What the workers do.
    tasks
        The chunks.
    place
        Returns where a chunk goes, or raises; called once for each chunk, in order.
    workers
        Number of processes.
    checker
        Is asked about each chunk before it is placed.
    first
        Number of the first chunk.
    warn
        Is told of each worker that died.

    Raises
    ------
    PreprocessError
        If an input cannot be read or an output cannot be written, or a chunk's workers die.
    InexactEncoderError
        If the checker finds a difference in what is to be placed next.
    """
    # One more is read ahead, and one is with whom it was yielded to.
    with lending(_OUTSTANDING_PER_WORKER * workers + 2, _BUFFER_BYTES):
        pool = _Pool(encoder, tasks, place, checker or Checker(), first, warn)
        try:
            for _ in range(workers):
                pool.start_worker()
            yield from pool.written()
        finally:
            pool.stop()


@dataclass
class _Chunk:
    number: int
    task: Task
    report: Report | PreprocessError | None = None
    check: Check | None = None
    holder: _Worker | None = None
    locations: dict[str, Location] | None = None
    deaths: int = 0


@dataclass(eq=False)
class _Worker:
    process: BaseProcess
    connection: Connection
    encoding: _Chunk | None = None
    holding: dict[int, _Chunk] = field(default_factory=dict)
    """The chunks that it has encoded, by number, and has not written yet."""

    def send(self, number: int | None, order: Task | dict[str, Location] | Encoded | None) -> None:
        # A task may be large, so it goes only to a worker that waits for one. Locations go to busy ones too:
        # they fit in the pipe's buffer, so the parent does not wait for a worker that waits to be read. Ids,
        # which have no number, go to one that waits for them.
        with suppress(OSError):  # the pipe of a worker that died breaks; reading from it tells
            self.connection.send((number, order))


class _Pool:
    """The parent's side: who encodes what, and what has a place."""

    def __init__(
        self,
        encoder: ChunkEncoder,
        tasks: Iterable[Task],
        place: Callable[[Report], dict[str, Location]],
        checker: Checker,
        first: int,
        warn: Callable[[str], None],
    ) -> None:
        self._encoder, self._place, self._warn = encoder, place, warn
        self._checker = checker
        self._source = (_Chunk(number, task) for number, task in enumerate(tasks, first))
        self._ahead: _Chunk | None = None
        self._again: list[_Chunk] = []
        """The chunks of workers that died, by number."""
        self._input_error: PreprocessError | None = None
        """Raised only when all that was read before is written."""
        self._unplaced: dict[int, _Chunk] = {}
        self._to_place = first
        self._outstanding = 0
        self._idle_deaths = 0
        self._workers: list[_Worker] = []
        checker.others = lambda: [worker.connection for worker in self._workers]

    def start_worker(self) -> None:
        ends = [*self._checker.connections, *(worker.connection for worker in self._workers)]
        try:
            self._workers.append(_Worker(*fork(_work, self._encoder, inherited=ends)))
        except OSError as error:
            raise PreprocessError(f"cannot start a worker process: {error.strerror}") from error

    def stop(self) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()

    def written(self) -> Generator[Written]:
        """Keep the workers busy until all is written."""
        while True:
            while (chunk := self._unplaced.get(self._to_place)) and (not chunk.check or chunk.check.done):
                self._place_chunk(chunk)
            self._hand_out()
            if not self._outstanding:
                if self._input_error:
                    raise self._input_error
                return
            # An idle worker's pipe has something to read only when it has died.
            answers = self._checker.answers
            ready = wait([*answers, *(worker.connection for worker in self._workers)])
            if any(connection in ready for connection in answers):
                self._checker.receive()
            for worker in [worker for worker in self._workers if worker.connection in ready]:
                try:
                    message = worker.connection.recv()
                except (EOFError, OSError):
                    self._replace(worker)
                    continue
                if isinstance(message, RareTexts):
                    self._checker.encode(message.texts, partial(worker.send, None))
                elif isinstance(message, _Done):
                    yield self._finish(worker, message)
                else:
                    self._take_report(worker, message)

    def _hand_out(self) -> None:
        for worker in self._workers:
            if worker.encoding is None and (chunk := self._chunk_for(worker)):
                worker.encoding = chunk
                worker.send(chunk.number, chunk.task)
        self._read_ahead()  # while all are busy

    def _chunk_for(self, worker: _Worker) -> _Chunk | None:
        if self._again:
            return self._again.pop(0)
        enough = self._outstanding >= _OUTSTANDING_PER_WORKER * len(self._workers)
        if enough or len(worker.holding) >= _HELD_PER_WORKER:
            return None
        self._read_ahead()
        chunk, self._ahead = self._ahead, None
        self._outstanding += chunk is not None
        return chunk

    def _read_ahead(self) -> None:
        if self._ahead is None and self._input_error is None:
            try:
                self._ahead = next(self._source, None)
            except PreprocessError as error:
                self._input_error = error

    def _take_report(self, worker: _Worker, report: Report | PreprocessError) -> None:
        chunk, worker.encoding = worker.encoding, None
        assert chunk
        before, chunk.report, chunk.holder = chunk.report, report, worker
        worker.holding[chunk.number] = chunk
        if chunk.locations is None:
            chunk.check = self._checker.ask(report.samples) if isinstance(report, Report) else None
            self._unplaced[chunk.number] = chunk
            return
        # Its first worker died after it had a place.
        if isinstance(report, PreprocessError):
            raise report
        assert isinstance(before, Report)
        if report.sizes != before.sizes:
            raise PreprocessError("the input changed while it was read")
        worker.send(chunk.number, chunk.locations)

    def _place_chunk(self, chunk: _Chunk) -> None:
        if isinstance(chunk.report, PreprocessError):
            raise chunk.report
        assert chunk.report and chunk.check and chunk.holder
        chunk.check.result()
        chunk.locations = self._place(chunk.report)
        del self._unplaced[chunk.number]
        self._to_place += 1
        chunk.holder.send(chunk.number, chunk.locations)

    def _finish(self, worker: _Worker, done: _Done) -> Written:
        if isinstance(done.checksums, PreprocessError):
            raise done.checksums
        chunk = worker.holding.pop(done.number)
        self._outstanding -= 1
        assert isinstance(chunk.report, Report)
        return Written(chunk.number, chunk.task, chunk.report, done.checksums)

    def _replace(self, worker: _Worker) -> None:
        """Start another worker for one that died; what it had is done again, before anything else."""
        worker.process.join()
        reason = f"worker process {worker.process.pid} {cause_of_death(worker.process)}"
        lost = [*worker.holding.values(), *([worker.encoding] if worker.encoding else [])]
        suspect = worker.encoding or next(iter(lost), None)
        if suspect:
            suspect.deaths += 1
        else:
            self._idle_deaths += 1
        if (suspect.deaths if suspect else self._idle_deaths) >= _DEATHS:
            raise PreprocessError(f"{reason}, the last of {_DEATHS} with the same work")
        self._warn(f"{reason}; its work is done again")
        for chunk in lost:
            self._unplaced.pop(chunk.number, None)
        self._again = sorted([*self._again, *lost], key=lambda chunk: chunk.number)
        self._workers.remove(worker)
        worker.connection.close()
        self.start_worker()


def _work(connection: Connection, encoder: ChunkEncoder) -> None:
    """Encode and write chunks until the pipe ends: the worker's side.

    Parameters
    ----------
    connection
        Brings pairs of a chunk's number and a task, or where to write that chunk; takes a ``Report`` or
        a ``PreprocessError`` for each task, and a ``_Done`` for each chunk that shall be written. In between
        it takes ``RareTexts``, and brings their ids without a number.
    encoder
        Encodes a chunk.
    """
    inbox = Inbox(connection)
    if encoder.guarded:
        encoder.guarded.exact = RareTextsEncoder(encoder.guarded.exact, inbox.ask)
    parts: dict[int, dict[str, Part]] = {}
    while True:
        number, order = inbox.next()
        if isinstance(order, Task):
            try:
                chunk = encoder.encode(order)
                parts[number] = chunk.parts
                connection.send(Report.of(chunk))
            except PreprocessError as error:
                connection.send(error)
        else:
            connection.send(_Done(number, _write(order, parts.pop(number))))


def _write(locations: dict[str, Location], parts: dict[str, Part]) -> dict[str, int] | PreprocessError:
    try:
        return {key: write_part(location, parts[key]) for key, location in locations.items()}
    except OSError as error:
        stem = next(iter(locations.values())).stem
        return PreprocessError(f"{stem}: cannot be written: {error.strerror or error}")
