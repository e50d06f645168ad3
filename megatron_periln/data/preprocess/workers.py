"""Worker processes that encode and write chunks, in bounded memory, and whose death costs a chunk.

Each worker has a pipe of its own, so no lock, queue or thread is shared with one that dies: its
pipe ends, even in the middle of a message. Tokens don't pass through the pipes: a worker reports
how many it has, learns where they go once all chunks before are known, and writes them there.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from megatron_periln.data.preprocess.encode import ChunkEncoder
from megatron_periln.data.preprocess.journal import Location
from megatron_periln.data.preprocess.worker import SIGNALS, Done, Report, cause_of_death, work
from megatron_periln.data.readers.inputs import Task
from megatron_periln.errors import PreprocessError

__all__ = ["Written", "encode_and_write"]

_OUTSTANDING_PER_WORKER = 4
_HELD_PER_WORKER = 2
_DEATHS = 3


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


@dataclass
class _Chunk:
    number: int
    task: Task
    report: Report | PreprocessError | None = None
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


def encode_and_write(
    encoder: ChunkEncoder,
    tasks: Iterable[Task],
    place: Callable[[Report], dict[str, Location]],
    workers: int,
    *,
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
    first
        Number of the first chunk.
    warn
        Is told of each worker that died.

    Raises
    ------
    PreprocessError
        If an input cannot be read or an output cannot be written, or a chunk's workers die.
    """
    run = _Run(encoder, tasks, place, first, warn)
    try:
        for _ in range(workers):
            run.start_worker()
        yield from run.written()
    finally:
        run.stop()


class _Run:
    def __init__(
        self,
        encoder: ChunkEncoder,
        tasks: Iterable[Task],
        place: Callable[[Report], dict[str, Location]],
        first: int,
        warn: Callable[[str], None],
    ) -> None:
        self._encoder, self._place, self._warn = encoder, place, warn
        self._source = (_Chunk(number, task) for number, task in enumerate(tasks, first))
        self._ahead: _Chunk | None = None
        self._again: list[_Chunk] = []
        self._input_error: PreprocessError | None = None
        self._unplaced: dict[int, _Chunk] = {}
        self._to_place = first
        self._outstanding = 0
        self._idle_deaths = 0
        self._workers: list[_Worker] = []

    def start_worker(self) -> None:
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        inherited = [ours, *(worker.connection for worker in self._workers)]
        process = context.Process(target=work, args=(self._encoder, theirs, inherited), daemon=True)
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until the worker has its own handlers
        try:
            process.start()
        except OSError as error:
            raise PreprocessError(f"cannot start a worker process: {error.strerror}") from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        theirs.close()
        self._workers.append(_Worker(process, ours))

    def stop(self) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()

    def written(self) -> Generator[Written]:
        while True:
            while chunk := self._unplaced.pop(self._to_place, None):
                self._place_chunk(chunk)
            self._give_out()
            if not self._outstanding:
                if self._input_error:
                    raise self._input_error
                return
            # An idle worker's pipe has something to read only when it has died.
            ready = wait([worker.connection for worker in self._workers])
            for worker in [worker for worker in self._workers if worker.connection in ready]:
                try:
                    message = worker.connection.recv()
                except (EOFError, OSError):
                    self._replace(worker)
                    continue
                if isinstance(message, Done):
                    yield self._finish(worker, message)
                else:
                    self._take(worker, message)

    def _give_out(self) -> None:
        for worker in self._workers:
            if worker.encoding is None and (chunk := self._chunk_for(worker)):
                worker.encoding = chunk
                _send(worker, chunk.number, chunk.task)
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

    def _take(self, worker: _Worker, report: Report | PreprocessError) -> None:
        chunk, worker.encoding = worker.encoding, None
        assert chunk
        before, chunk.report, chunk.holder = chunk.report, report, worker
        worker.holding[chunk.number] = chunk
        if chunk.locations is None:
            self._unplaced[chunk.number] = chunk
            return
        # Its first worker died after it had a place.
        if isinstance(report, PreprocessError):
            raise report
        assert isinstance(before, Report)
        if report.sizes != before.sizes:
            raise PreprocessError("the input changed while it was read")
        _send(worker, chunk.number, chunk.locations)

    def _place_chunk(self, chunk: _Chunk) -> None:
        if isinstance(chunk.report, PreprocessError):
            raise chunk.report
        assert chunk.report and chunk.holder
        chunk.locations = self._place(chunk.report)
        self._to_place += 1
        _send(chunk.holder, chunk.number, chunk.locations)

    def _finish(self, worker: _Worker, done: Done) -> Written:
        if isinstance(done.checksums, PreprocessError):
            raise done.checksums
        chunk = worker.holding.pop(done.number)
        self._outstanding -= 1
        assert isinstance(chunk.report, Report)
        return Written(chunk.number, chunk.task, chunk.report, done.checksums)

    def _replace(self, worker: _Worker) -> None:
        worker.process.join()
        reason = cause_of_death(worker.process)
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


def _send(worker: _Worker, number: int, order: Task | dict[str, Location]) -> None:
    # The pipe of a worker that died breaks; reading from it tells.
    with suppress(OSError):
        worker.connection.send((number, order))
