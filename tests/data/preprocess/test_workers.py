"""Worker processes: their start and end, their order, their memory."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_periln.data.readers.sources import Block
from megatron_periln.data.readers.tasks import Task
from megatron_periln.errors import PreprocessError
from tests.data.preprocessing import to_lines
from tests.data.worker_runs import Run, Started, blocks

pytestmark = pytest.mark.usefixtures("hangs_fail")


@pytest.fixture
def run_workers(tmp_path: Path) -> Run:
    return Run(tmp_path)


@pytest.mark.parametrize("forks", [0, 1, 2])
def test_no_process_can_be_started(
    run_workers: Run, started: Started, monkeypatch: pytest.MonkeyPatch, forks: int
) -> None:
    """At the start, or in place of one that died."""
    fork, forked = os.fork, []

    def fork_some() -> int:
        if len(forked) == forks:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        forked.append(True)
        return fork()

    monkeypatch.setattr(os, "fork", fork_some)
    with pytest.raises(PreprocessError, match="cannot start a worker process: Resource temporarily unavail"):
        list(run_workers(lambda text: os._exit(1), blocks("a")))
    assert not started()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()


def test_interrupts_are_for_the_parent(run_workers: Run) -> None:
    """Ctrl-C reaches every process of a terminal; SIGTERM still ends a worker."""
    list(run_workers(lambda text: os.kill(os.getpid(), signal.SIGINT), blocks("abc")))
    assert run_workers.text() == "abc"
    assert run_workers.notes == []


def test_a_busy_worker_does_not_delay_the_end(tmp_path: Path, run_workers: Run, started: Started) -> None:
    """Not even one that SIGTERM does not end."""

    def act(text: str) -> None:
        if text == "b":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            (tmp_path / "busy").touch()
            time.sleep(100)

    chunks = run_workers(act, blocks("ab"))
    assert next(chunks).number == 0
    while not (tmp_path / "busy").exists():
        time.sleep(0.01)
    chunks.close()  # type: ignore[attr-defined]
    assert not started()


def test_error_while_reading_comes_after_what_was_read(run_workers: Run) -> None:
    def chunks() -> Iterator[Task]:
        yield from blocks("abc")
        raise PreprocessError("the rest cannot be read")

    written = []
    with pytest.raises(PreprocessError, match="the rest cannot be read"):
        written.extend(run_workers(lambda text: time.sleep(0.05), chunks()))
    assert run_workers.text() == "abc"


def test_memory_is_bounded(run_workers: Run) -> None:
    """Input is read only a few chunks ahead of the output, also while one chunk takes long."""
    read = 0

    def chunks() -> Iterator[Task]:
        nonlocal read
        for task in blocks(["slow", *(["fast"] * 99)]):
            read += 1
            yield task

    ahead = [
        read - written
        for written, _ in enumerate(run_workers(lambda text: time.sleep(0.2 * (text == "slow")), chunks()))
    ]
    assert read == 100
    assert 2 < max(ahead) <= 5


@pytest.mark.parametrize("count", [1, 2])
def test_large_messages_in_both_directions(run_workers: Run, count: int) -> None:
    """Chunks through the pipe one way, bad documents the other way."""
    bad = b'{"text": "\\ud800%s"}\n' % (b"x" * 600_000)
    tasks = [Task(Block("file", 0, 1, bad + to_lines(["a"]), 1)) for _ in range(30)]
    written = list(run_workers(lambda text: None, tasks, workers=count, stop=False))
    assert all(len(chunk.report.bad[0].content or "") > 600_000 for chunk in written)
    assert run_workers.text() == "a" * 30


def test_workers_end_with_their_parent(tmp_path: Path, tool: Any, stub: Callable) -> None:
    """Busy or idle, at once."""
    working = tmp_path / "working"

    def work(text: str) -> None:
        working.touch()
        time.sleep(100)

    stub(work)
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
