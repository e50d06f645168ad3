"""Worker processes that encode in order, in bounded memory, and whose death ends the run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess

from megatron_periln.data.documents import Line
from megatron_periln.data.encode import EncodedChunk, Encoder
from megatron_periln.data.errors import PreprocessError

__all__ = ["encode_in_order"]

_CHUNKS_IN_FLIGHT_PER_WORKER = 4

_encoder: Encoder


def encode_in_order(encoder: Encoder, chunks: Iterable[list[Line]], workers: int) -> Generator[EncodedChunk]:
    """Encode chunks in worker processes and yield the results in the order of the chunks.

    Workers are forked, so that each shares the tokenizer built here instead of building its own.
    ``chunks`` is read only a few chunks ahead of what was yielded.

    Raises
    ------
    PreprocessError
        What ``Encoder.encode`` raises for the first bad line, or that a worker died and of what.
    """
    executor = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("fork"),
        initializer=_start_worker,
        initargs=(encoder,),
    )
    others = set(multiprocessing.active_children())
    processes: set[BaseProcess] = set()
    pending: deque[Future[EncodedChunk]] = deque()
    try:
        for chunk in chunks:
            pending.append(executor.submit(_encode, chunk))
            processes = processes or set(multiprocessing.active_children()) - others
            if len(pending) == _CHUNKS_IN_FLIGHT_PER_WORKER * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BaseException as error:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        executor.shutdown()
        if isinstance(error, BrokenProcessPool):
            raise PreprocessError(_cause_of_death(processes)) from error
        raise
    executor.shutdown()


def _start_worker(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    # Ctrl-C reaches every process of the terminal; the parent alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(lines: list[Line]) -> EncodedChunk:
    return _encoder.encode(lines)


def _cause_of_death(processes: Iterable[BaseProcess]) -> str:
    """Say how the worker died that broke the pool; the others are ended with SIGTERM."""
    codes = {process.pid: process.exitcode for process in processes if process.exitcode}
    dead = next((pid for pid, code in codes.items() if code != -signal.SIGTERM), None)
    if dead is None:
        return "a worker process was terminated; run again"
    code = codes[dead]
    assert code is not None
    if code > 0:
        return f"worker process {dead} ended with exit code {code}; run again"
    advice = (
        "often the kernel for lack of memory: use fewer --workers" if code == -signal.SIGKILL else "run again"
    )
    return f"worker process {dead} was killed by {signal.Signals(-code).name} ({advice})"
