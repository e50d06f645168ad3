"""Worker processes that encode in order, in bounded memory, and whose death ends the run.

Each worker has a pipe of its own and at most one chunk at a time, so no lock, queue or thread is
shared with one that dies: its pipe ends, even in the middle of a message.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import NoReturn

from megatron_periln.data.documents import Line
from megatron_periln.data.encode import EncodedChunk, Encoder
from megatron_periln.data.errors import PreprocessError

__all__ = ["encode_in_order"]

_CHUNKS_AHEAD_PER_WORKER = 4


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    chunk: int | None = None
    """Number of the chunk that it encodes; None while it is idle."""


def encode_in_order(encoder: Encoder, chunks: Iterable[list[Line]], workers: int) -> Generator[EncodedChunk]:
    """Encode chunks in worker processes and yield the results in the order of the chunks.

    Workers are forked, so that each shares the tokenizer built here instead of building its own.
    ``chunks`` is read only a few chunks ahead of what was yielded.

    Raises
    ------
    PreprocessError
        What ``Encoder.encode`` raises for the first bad line, or that a worker died and of what.
    """
    pool: list[_Worker] = []
    try:
        for _ in range(workers):
            pool.append(_start_worker(encoder, [worker.connection for worker in pool]))
        yield from _encode(pool, chunks)
    finally:
        for worker in pool:
            worker.process.terminate()
        for worker in pool:
            worker.process.join()


def _encode(pool: list[_Worker], chunks: Iterable[list[Line]]) -> Generator[EncodedChunk]:
    source = iter(chunks)
    results: dict[int, EncodedChunk | PreprocessError] = {}
    sent = yielded = 0
    exhausted = False
    while not exhausted or yielded < sent:
        for worker in pool:
            if (
                worker.chunk is None
                and not exhausted
                and sent < yielded + _CHUNKS_AHEAD_PER_WORKER * len(pool)
            ):
                chunk = next(source, None)
                if chunk is None:
                    exhausted = True
                else:
                    _send(worker, chunk)
                    worker.chunk = sent
                    sent += 1
        # An idle worker's pipe has something to read only when it has died.
        ready = wait([worker.connection for worker in pool]) if yielded < sent else []
        for worker in pool:
            if worker.connection in ready:
                result = _receive(worker)
                assert worker.chunk is not None
                results[worker.chunk] = result
                worker.chunk = None
        while yielded in results:
            result = results.pop(yielded)
            if isinstance(result, PreprocessError):
                raise result
            yield result
            yielded += 1


def _start_worker(encoder: Encoder, others: list[Connection]) -> _Worker:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(encoder, theirs, [*others, ours]), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _work(encoder: Encoder, connection: Connection, inherited: list[Connection]) -> None:
    """Encode chunks until the parent closes the pipe or dies."""
    # Ctrl-C reaches every process of the terminal; the parent alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # The parent's ends of the pipes must be open in the parent only, or its death would go unnoticed.
    for end in inherited:
        end.close()
    try:
        while True:
            lines = connection.recv()
            try:
                result: EncodedChunk | PreprocessError = encoder.encode(lines)
            except PreprocessError as error:
                result = error
            connection.send(result)
    except (EOFError, OSError):
        pass


def _send(worker: _Worker, chunk: list[Line]) -> None:
    try:
        worker.connection.send(chunk)
    except OSError:
        _report_death(worker)


def _receive(worker: _Worker) -> EncodedChunk | PreprocessError:
    try:
        return worker.connection.recv()
    except (EOFError, OSError):
        _report_death(worker)


def _report_death(worker: _Worker) -> NoReturn:
    worker.process.join()
    code = worker.process.exitcode or 0
    name = f"worker process {worker.process.pid}"
    if code >= 0:
        raise PreprocessError(f"{name} ended with exit code {code}; run again")
    reason = signal.Signals(-code).name
    if -code == signal.SIGKILL:
        reason += ", often sent by the kernel for lack of memory; use fewer --workers"
    raise PreprocessError(f"{name} was killed by {reason}")
