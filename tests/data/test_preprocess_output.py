"""Outputs appear whole or not at all: failures, dead workers, signals; and what a run reports."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_periln.data.documents import Line
from megatron_periln.data.encode import Encoder
from megatron_periln.data.errors import PreprocessError
from megatron_periln.data.workers import encode_in_order
from megatron_periln.data.writer import EncodedDocuments, open_writers

LINES = [Line("file", 1, b'{"text": "a"}')]


class Characters:
    """A tokenizer of single characters that acts on some texts."""

    vocab_size = 256
    eod = 0

    def __init__(self, act: Callable[[str], None] = lambda text: None) -> None:
        self.act = act

    def tokenize(self, text: str) -> list[int]:
        self.act(text)
        return [ord(character) for character in text]


@pytest.fixture
def stub(tool: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str], None]], None]:
    def use(act: Callable[[str], None]) -> None:
        monkeypatch.setattr(tool, "build_tokenizer", lambda _: Characters(act))

    return use


def outputs(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("out*"))


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


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_failure_to_write(
    tmp_path: Path,
    stub: Callable,
    refused: Callable[..., str],
    write_lines: Callable,
    monkeypatch: pytest.MonkeyPatch,
    failing: str,
) -> None:
    """The disk is full at the last of four steps, after the first dataset is complete."""
    stub(lambda text: None)
    calls = 0
    owner = os if failing == "fsync" else Path
    original = getattr(owner, failing)

    def fail(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args)

    monkeypatch.setattr(owner, failing, fail)
    lines = write_lines(tmp_path / "in.jsonl", [{"text": "a", "title": "b"}])
    message = refused(
        *("--input", lines, "--output-prefix", tmp_path / "out", "--json-keys", "text", "title")
    )
    assert f"{tmp_path}/out_title_document: cannot be written: No space left on device" in message
    assert calls == 4
    assert outputs(tmp_path) == []


def test_names_appear_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the final names: nothing while writing; then .bin; then .idx; an old .idx goes first."""
    seen: list[list[str]] = []
    original = Path.replace

    def watch(self: Path, target: Path) -> Path:
        seen.append(sorted(path.suffix for path in tmp_path.glob("out.*") if path.suffix != ".tmp"))
        return original(self, target)

    monkeypatch.setattr(Path, "replace", watch)
    (tmp_path / "out.idx").write_text("outdated")
    one = EncodedDocuments(np.ones(3, np.uint16), np.array([3], np.int32), np.array([1], np.int64))
    with open_writers([str(tmp_path / "out")], np.dtype(np.uint16)) as writers:
        writers[0].add(one)
        assert not (tmp_path / "out.bin").exists()
    assert seen == [[], [".bin"]]
    assert outputs(tmp_path) == ["out.bin", "out.idx"]


def test_failure_midway(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), open_writers([str(tmp_path / "out")], np.dtype(np.uint16)):
        assert len(outputs(tmp_path)) == 1
        _ = 1 / 0
    assert outputs(tmp_path) == []


def signal_midway(folder: Path, pid: int, number: int) -> None:
    """Send a signal to a run that reads ``folder / "in"``, a pipe, and has begun its outputs."""
    with (folder / "in").open("wb", buffering=0) as pipe:
        pipe.write(b'{"text": "a"}\n' * 100_000)
        assert len(outputs(folder)) == 1
        os.kill(pid, number)


def test_interrupt(
    tmp_path: Path, tool_command: list[str], tokenizers: dict[str, list[str]], hangs_fail: None
) -> None:
    """Ctrl-C, in a process of its own: nothing else is on stderr."""
    os.mkfifo(tmp_path / "in")
    flags = ["--input", tmp_path / "in", "--output-prefix", tmp_path / "out", "--workers", "2"]
    process = subprocess.Popen(
        [*tool_command, *flags, *tokenizers["tiktoken"], "--log-interval", "1000000"],
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore SIGINT, and so would the processes that they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    signal_midway(tmp_path, process.pid, signal.SIGINT)
    assert process.communicate()[1] == "interrupted: nothing was written\n"
    assert process.returncode == 130
    assert outputs(tmp_path) == []


def test_terminate(
    tmp_path: Path, tool: Any, stub: Callable, monkeypatch: pytest.MonkeyPatch, hangs_fail: None
) -> None:
    stub(lambda text: None)
    os.mkfifo(tmp_path / "in")
    argv = ["tool", "--input", str(tmp_path / "in"), "--output-prefix", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", argv)
    process = multiprocessing.get_context("fork").Process(target=tool.command)
    process.start()
    assert process.pid
    signal_midway(tmp_path, process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 143
    assert outputs(tmp_path) == []


def test_report(tmp_path: Path, stub: Callable, run: Callable, write_lines: Callable) -> None:
    stub(lambda text: None)
    lines = write_lines(tmp_path / "in.jsonl", [{"text": "ab", "title": "c"}] * 10)
    flags = ["--input", lines, "--output-prefix", tmp_path / "new" / "out", "--log-interval", 10]
    code, stderr = run(*flags, "--json-keys", "text", "title", "text", "--append-eod")
    progress, summary = stderr.splitlines()
    assert code == 0
    assert progress.startswith("Processed 10 documents (")
    assert "docs/s" in progress
    assert "MB/s" in progress
    assert f"Wrote 10 documents, 50 tokens, from {lines.stat().st_size} bytes in " in summary
    files = [
        f"{tmp_path}/new/out_{key}_document.{suffix}"
        for key in ("text", "title")
        for suffix in ("bin", "idx")
    ]
    assert summary.endswith(" ".join(files))


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
