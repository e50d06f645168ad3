"""Worker processes: their deaths, their memory."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_periln.data.encode import Encoder
from megatron_periln.data.errors import PreprocessError
from megatron_periln.data.workers import encode_in_order
from tests.data.characters import LINES, Characters, outputs


def kill_self(number: int) -> Callable[[str], None]:
    def act(text: str) -> None:
        if text.startswith("die"):
            os.kill(os.getpid(), number)

    return act


@pytest.mark.parametrize("size", [10, 300_000])
@pytest.mark.parametrize(
    ("number", "expected"),
    [(signal.SIGKILL, "SIGKILL, often sent by the kernel for lack of memory"), (signal.SIGTERM, "SIGTERM")],
)
def test_killed_worker(
    tmp_path: Path,
    stub: Callable,
    refused: Callable[..., str],
    write_lines: Callable,
    monkeypatch: pytest.MonkeyPatch,
    hangs_fail: None,
    size: int,
    number: int,
    expected: str,
) -> None:
    monkeypatch.setattr("megatron_periln.data.preprocess._CHUNK_BYTES", 100)
    stub(kill_self(number))
    texts = [f"{'die' if n == 40 else 'live'}{n}{'x' * size}" for n in range(80)]
    lines = write_lines(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    message = refused("--input", lines, "--output-prefix", tmp_path / "out", "--workers", 2)
    assert "worker process" in message
    assert f"was killed by {expected}" in message
    assert outputs(tmp_path) == []


def test_worker_that_exits(
    tmp_path: Path, stub: Callable, refused: Callable[..., str], write_lines: Callable, hangs_fail: None
) -> None:
    stub(lambda text: os._exit(3))
    lines = write_lines(tmp_path / "in.jsonl", [{"text": "a"}])
    message = refused("--input", lines, "--output-prefix", tmp_path / "out", "--workers", 2)
    assert "ended with exit code 3" in message


def test_worker_is_killed_in_the_middle_of_its_answer(hangs_fail: None) -> None:
    def send_half(connection: Connection, message: bytes) -> None:
        os.write(connection.fileno(), message[: len(message) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    def act(text: str) -> None:
        Connection._send = send_half  # in the worker, a copy of this process

    encoder = Encoder(Characters(act), ["text"], np.dtype(np.uint16))
    with pytest.raises(PreprocessError, match="was killed by SIGKILL"):
        list(encode_in_order(encoder, [LINES], workers=2))


def test_idle_worker_is_killed(hangs_fail: None) -> None:
    def chunks() -> Any:
        yield LINES
        for process in multiprocessing.active_children():
            process.kill()
            process.join()
        yield LINES

    encoder = Encoder(Characters(), ["text"], np.dtype(np.uint16))
    with pytest.raises(PreprocessError, match="was killed by SIGKILL"):
        list(encode_in_order(encoder, chunks(), workers=1))


def test_no_process_can_be_started(
    tmp_path: Path,
    stub: Callable,
    refused: Callable[..., str],
    write_lines: Callable,
    monkeypatch: pytest.MonkeyPatch,
    hangs_fail: None,
) -> None:
    stub(lambda text: None)
    fork, forked = os.fork, []

    def fork_once() -> int:
        if forked:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        forked.append(True)
        return fork()

    monkeypatch.setattr(os, "fork", fork_once)
    lines = write_lines(tmp_path / "in.jsonl", [{"text": "a"}])
    message = refused("--input", lines, "--output-prefix", tmp_path / "out", "--workers", 2)
    assert "Resource temporarily unavailable" in message
    assert outputs(tmp_path) == []
    assert not multiprocessing.active_children()


def test_panic_in_a_tokenizer(
    tmp_path: Path, stub: Callable, refused: Callable[..., str], write_lines: Callable
) -> None:
    class Panic(BaseException):
        """Stands in for ``pyo3_runtime.PanicException``."""

    def panic(text: str) -> None:
        raise Panic("stack\noverflow")

    stub(panic)
    lines = write_lines(tmp_path / "in.jsonl", [{"text": "a"}])
    message = refused("--input", lines, "--output-prefix", tmp_path / "out")
    assert f"{lines}:1: key 'text' cannot be tokenized: Panic: stack overflow" in message


def test_workers_end_with_their_parent(tmp_path: Path, tool: Any, stub: Callable, hangs_fail: None) -> None:
    """The busy one when its chunk is done, the idle one at once."""
    working = tmp_path / "working"

    def outlive_the_parent(text: str) -> None:
        parent = os.getppid()
        working.touch()
        while os.getppid() == parent:
            time.sleep(0.01)

    stub(outlive_the_parent)
    lines = tmp_path / "in.jsonl"
    lines.write_text('{"text": "a"}\n')
    argv = ["--input", str(lines), "--output-prefix", str(tmp_path / "out"), "--workers", "2"]
    parent = multiprocessing.get_context("fork").Process(target=tool.main, args=(argv,))
    parent.start()
    while not working.exists():
        time.sleep(0.01)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    assert len(children) == 2
    parent.kill()
    parent.join()
    for stat in [Path(f"/proc/{child}/stat") for child in children]:
        while stat.exists() and ") Z " not in stat.read_text():
            time.sleep(0.01)


def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Input is read only a few chunks ahead of the output."""
    read = 0

    def chunks() -> Any:
        nonlocal read
        for _ in range(100):
            read += 1
            yield LINES

    encoder = Encoder(Characters(), ["text"], np.dtype(np.uint16))
    for written, chunk in enumerate(encode_in_order(encoder, chunks(), workers=2)):
        assert chunk.lines == 1
        assert read - written <= 9
    assert read == 100
