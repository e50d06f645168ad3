"""An encoder in a process of its own, which loads it while this one goes on.

The fast encoder and the library that it is checked against take as long to load, and neither lets another
thread of its process run meanwhile.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from megatron_periln.data.tokenizers.encoders.base import BatchEncoder, Encoded
from megatron_periln.files import allow_open_files

__all__ = ["Neighbour", "NeighbourEncoder"]

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_CHARACTERS = 1 << 24
"""What the process encodes for all, about; who needs more of it loads the encoder."""


class NeighbourEncoder:
    """Asks the process that has the encoder; where that has ended, or fails, it is loaded here.

    Parameters
    ----------
    encoder
        The encoder.
    """

    def __init__(self, encoder: BatchEncoder) -> None:
        self.name = encoder.name
        self._encoder = encoder
        self._connection: Connection | None = None
        self._left = 0

    def connect(self, connection: Connection | None, characters: int) -> None:
        """Ask by this pipe from now on, for so many characters."""
        self._connection, self._left = connection, characters

    def load(self) -> None:
        """Load the encoder in this process."""
        self._encoder.load()

    def encode(self, texts: list[str]) -> Encoded:
        """Return the token ids of ``texts``."""
        self._left -= sum(map(len, texts))
        if self._left < 0:
            self._connection = None
        if self._connection:
            with suppress(EOFError, OSError):
                self._connection.send(texts)
                if found := self._connection.recv():
                    return found
            self._connection = None
        return self._encoder.encode(texts)


class Neighbour:
    """The process, which is there from the call of `load` to that of `close`.

    Parameters
    ----------
    clients
        How many processes may ask it.
    """

    def __init__(self, clients: int) -> None:
        self._clients = clients
        self._encoder: NeighbourEncoder | None = None
        self._process: BaseProcess | None = None
        self._pipes: list[Connection] = []

    def close(self) -> None:
        """End the process; nobody asks it any more."""
        if self._process:
            self._process.kill()
            self._process.join()
        self._process = self._encoder = None
        self._close_pipes()

    def load(self, encoder: BatchEncoder) -> BatchEncoder:
        """Return an encoder that is loaded in the process from now on; here, where no process can be had."""
        allow_open_files()
        context = multiprocessing.get_context("fork")
        asked = NeighbourEncoder(encoder)
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            pairs = [context.Pipe() for _ in range(self._clients)]
            self._pipes = [ours for ours, _ in pairs]
            theirs = [pipe for _, pipe in pairs]
            self._process = context.Process(target=_serve, args=(encoder, theirs, self._pipes), daemon=True)
            self._process.start()
        except OSError:
            self._process = None
            self._close_pipes()
            encoder.load()
            return encoder
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for pipe in theirs:
            pipe.close()
        self._encoder = asked
        return asked

    def take(self, number: int) -> None:
        """Let this process, forked as the ``number``-th from 0, ask by a pipe that no other has.

        There is none for those that replace dead ones: a pipe may hold half of what those were answered.
        """
        if self._encoder:
            mine = self._pipes.pop(number) if number < len(self._pipes) else None
            self._close_pipes()
            self._encoder.connect(mine, _CHARACTERS // self._clients)

    def _close_pipes(self) -> None:
        while self._pipes:
            self._pipes.pop().close()


def _serve(encoder: BatchEncoder, pipes: list[Connection], others: list[Connection]) -> None:
    """Load the encoder and answer until the parent ends: the process's side."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for pipe in others:
        pipe.close()
    with suppress(BaseException):  # who asks loads it as well, and finds the same
        encoder.load()
    while pipes:
        ready = wait(pipes)
        for pipe in [pipe for pipe in pipes if pipe in ready]:
            try:
                texts = pipe.recv()
            except (EOFError, OSError):
                pipes.remove(pipe)
                continue
            try:
                found = encoder.encode(texts)
            except BaseException:  # a panic in a tokenizer written in Rust is no Exception
                found = None
            with suppress(OSError):
                pipe.send(found)
