"""A worker process: it encodes chunks, and writes them where it is told to."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from megatron_periln.data.preprocess.encode import ChunkEncoder, EncodedChunk, Part
from megatron_periln.data.preprocess.journal import Location, Size, write_part
from megatron_periln.data.readers.documents import BadDocument
from megatron_periln.data.readers.inputs import Task
from megatron_periln.errors import PreprocessError

__all__ = ["SIGNALS", "Done", "Report", "cause_of_death", "work"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""The signals by which a run is stopped."""

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Report:
    """What a worker says about a chunk that it has encoded.

    Parameters
    ----------
    sizes
        For each key, how much it has.
    empty
        For each key, its documents without tokens.
    bytes, left_out, bad, difference
        As in ``EncodedChunk``.
    """

    sizes: dict[str, Size]
    empty: dict[str, int]
    bytes: int
    left_out: dict[str, int]
    bad: list[BadDocument]
    difference: str | None

    @classmethod
    def of(cls, chunk: EncodedChunk) -> Report:
        """Describe ``chunk``."""
        sizes = {key: Size(*map(len, part)) for key, part in chunk.parts.items()}
        empty = {key: part.empty for key, part in chunk.parts.items()}
        return cls(sizes, empty, chunk.bytes, chunk.left_out, chunk.bad, chunk.difference)


@dataclass(frozen=True)
class Done:
    """What a worker says about a chunk that it has written.

    Parameters
    ----------
    number
        Its number.
    checksums
        For each key, the CRC-32 of what was written; or why it could not be written.
    """

    number: int
    checksums: dict[str, int] | PreprocessError


def work(encoder: ChunkEncoder, connection: Connection, inherited: list[Connection]) -> None:
    """Encode and write chunks until the parent closes the pipe or dies.

    Parameters
    ----------
    encoder
        Encodes a chunk.
    connection
        Brings pairs of a chunk's number and a task, or where to write that chunk; takes a ``Report`` or
        a ``PreprocessError`` for each task, and a ``Done`` for each chunk that shall be written.
    inherited
        The ends of pipes that belong to the parent.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Ctrl-C reaches every process of the terminal; the parent alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.freeze()  # what was made before the fork is not looked through again
    # The parent's ends of the pipes must be open in the parent only, or its death would go unnoticed.
    for end in inherited:
        end.close()
    parts: dict[int, dict[str, Part]] = {}
    try:
        while True:
            number, order = connection.recv()
            if isinstance(order, Task):
                try:
                    chunk = encoder.encode(order)
                    parts[number] = chunk.parts
                    connection.send(Report.of(chunk))
                except PreprocessError as error:
                    connection.send(error)
            else:
                connection.send(Done(number, _write(order, parts.pop(number))))
    except (EOFError, OSError):
        pass


def _write(locations: dict[str, Location], parts: dict[str, Part]) -> dict[str, int] | PreprocessError:
    try:
        return {key: write_part(location, parts[key]) for key, location in locations.items()}
    except OSError as error:
        stem = next(iter(locations.values())).stem
        return PreprocessError(f"{stem}: cannot be written: {error.strerror or error}")


def cause_of_death(process: BaseProcess) -> str:
    """Return how a process ended."""
    code = process.exitcode or 0
    name = f"worker process {process.pid}"
    if code >= 0:
        return f"{name} ended with exit code {code}"
    reason = signal.Signals(-code).name
    if -code == signal.SIGKILL:
        reason += ", often sent by the kernel for lack of memory: use fewer --workers"
    return f"{name} was killed by {reason}"
