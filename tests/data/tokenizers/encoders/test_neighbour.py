"""The library's encoder in a process of its own: the same ids, also where that process ends or fails."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest

from megatron_periln.data.tokenizers.encoders import Encoded, Neighbour
from megatron_periln.data.tokenizers.encoders.neighbour import NeighbourEncoder

TEXTS = ["ab", "", "c"]
HERE = os.getpid()


class Telling:
    """Gives the id of the process that encodes for each text; fails on some."""

    name = "telling"
    loaded = 0

    def load(self) -> None:
        self.loaded = os.getpid()

    def encode(self, texts: list[str]) -> Encoded:
        if "fails" in texts and os.getpid() != HERE:
            raise BaseException("a panic")
        return np.full(len(texts), os.getpid(), np.uint32), np.full(len(texts), self.loaded, np.int64)


def who(encoder: Any, texts: list[str]) -> tuple[int, int]:
    """Return which process encodes, and which one loaded the encoder."""
    ids, lengths = encoder.encode(texts)
    assert len(ids) == len(texts)
    return int(ids[0]), int(lengths[0])


@pytest.fixture
def neighbour(hangs_fail: None) -> Iterator[Neighbour]:
    with closing(Neighbour(2)) as neighbour:
        yield neighbour


def test_it_is_loaded_and_asked_there(neighbour: Neighbour) -> None:
    encoder = neighbour.load(Telling())
    assert who(encoder, TEXTS) == (os.getpid(), 0)  # this process has no pipe
    neighbour.take(1)
    assert neighbour._process
    there = neighbour._process.pid
    assert there != os.getpid()
    assert who(encoder, TEXTS) == (there, there)
    assert who(encoder, ["x" * 100_000] * 3) == (there, there)
    assert who(encoder, ["fails"]) == (os.getpid(), 0)
    encoder.load()
    assert who(encoder, TEXTS) == (os.getpid(), os.getpid())


def test_its_end(neighbour: Neighbour) -> None:
    encoder = neighbour.load(Telling())
    neighbour.take(0)
    assert neighbour._process
    assert who(encoder, TEXTS)[0] == neighbour._process.pid
    os.kill(neighbour._process.pid or 0, signal.SIGKILL)
    assert who(encoder, TEXTS)[0] == os.getpid()
    neighbour.close()
    assert neighbour._process is None


def test_who_needs_much_loads_it(neighbour: Neighbour, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_periln.data.tokenizers.encoders.neighbour._CHARACTERS", 8)
    encoder = neighbour.load(Telling())
    neighbour.take(0)
    assert who(encoder, ["abcd"])[0] != os.getpid()
    assert who(encoder, ["e"])[0] == os.getpid()


def test_a_worker_that_replaces_another_has_no_pipe(neighbour: Neighbour) -> None:
    encoder = neighbour.load(Telling())
    neighbour.take(2)
    assert who(encoder, TEXTS)[0] == os.getpid()


def test_no_process_can_be_started(neighbour: Neighbour, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise BlockingIOError

    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", refuse)
    telling = Telling()
    assert neighbour.load(telling) is telling
    assert telling.loaded == os.getpid()
    neighbour.take(0)


def test_nobody_asks_after_its_end(neighbour: Neighbour) -> None:
    encoder = neighbour.load(Telling())
    assert isinstance(encoder, NeighbourEncoder)
    neighbour.close()
    neighbour.take(0)
    assert who(encoder, TEXTS)[0] == os.getpid()
