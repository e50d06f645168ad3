"""Workers that die: their chunks are done again, in their places, or the run ends with the reason."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_periln.data.preprocess import workers
from megatron_periln.data.readers.sources import ByteRange
from megatron_periln.data.readers.tasks import Task
from megatron_periln.errors import PreprocessError
from tests.data.preprocessing import to_lines
from tests.data.worker_runs import UINT16, Run, Started, blocks

pytestmark = pytest.mark.usefixtures("hangs_fail")


@pytest.fixture
def run_workers(tmp_path: Path) -> Run:
    return Run(tmp_path)


def once(tmp_path: Path, act: Callable[[], None]) -> Callable[[], None]:
    """Return what acts in the first process that calls it only."""

    def act_once() -> None:
        try:
            (tmp_path / "acted").touch(exist_ok=False)
        except FileExistsError:
            return
        act()

    return act_once


def kill_self(number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("size", [10, 200_000])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(
    ("number", "expected"),
    [(signal.SIGKILL, "SIGKILL, often sent by the kernel for lack of memory"), (signal.SIGTERM, "SIGTERM; ")],
)
def test_killed_while_encoding(
    tmp_path: Path, run_workers: Run, size: int, count: int, number: int, expected: str
) -> None:
    """Its chunk is done again, in its place, and people are told."""
    die = once(tmp_path, lambda: kill_self(number))
    texts = [f"{n}{'x' * size}" for n in range(20)]
    list(run_workers(lambda text: die() if text.startswith("7") else None, blocks(texts), workers=count))
    assert run_workers.text() == "".join(texts)
    (note,) = run_workers.notes
    assert note.startswith("worker process ")
    assert f"was killed by {expected}" in note
    assert note.endswith("its work is done again")
    assert run_workers.placed == 20


@pytest.mark.parametrize("end", [kill_self, lambda: os._exit(3)])
def test_killed_again_and_again(run_workers: Run, started: Started, end: Callable[[], None]) -> None:
    reason = "was killed by SIGKILL.*" if end is kill_self else "ended with exit code 3"
    with pytest.raises(
        PreprocessError, match=rf"^worker process \d+ {reason}, the last of 3 with the same work$"
    ):
        list(run_workers(lambda text: end() if text == "7" else None, blocks(map(str, range(20)))))
    assert len(run_workers.notes) == 2
    assert not started()


def test_killed_in_the_middle_of_its_answer(tmp_path: Path, run_workers: Run) -> None:
    def send_half(connection: Connection, message: bytes) -> None:
        os.write(connection.fileno(), message[: len(message) // 2])
        kill_self()

    def act() -> None:
        Connection._send = send_half  # type: ignore[attr-defined]  # in the worker, a copy of this process

    die = once(tmp_path, act)
    list(run_workers(lambda text: die(), blocks("abc")))
    assert run_workers.text() == "abc"
    assert len(run_workers.notes) == 1


def test_killed_while_idle(run_workers: Run, started: Started) -> None:
    def chunks() -> Iterator[Task]:
        (first, second) = blocks("ab")
        yield first
        workers = started()
        for process in multiprocessing.active_children():
            if process.pid in workers:
                process.kill()
                process.join()
        yield second

    list(run_workers(lambda text: None, chunks(), workers=3))
    assert run_workers.text() == "ab"
    assert len(run_workers.notes) == 3


def test_killed_while_idle_again_and_again(run_workers: Run, started: Started) -> None:
    def kill_the_idle() -> None:
        while not done.wait(0.05):
            for process in started()[1:]:
                os.kill(process, signal.SIGKILL)

    done = threading.Event()
    killer = threading.Thread(target=kill_the_idle)
    killer.start()
    with pytest.raises(PreprocessError, match=r"was killed by SIGKILL.* the last of 3 with the same work"):
        list(run_workers(lambda text: time.sleep(10), blocks("a")))
    done.set()
    killer.join()


@pytest.mark.parametrize("count", [1, 3])
def test_killed_before_it_writes(
    tmp_path: Path, run_workers: Run, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """The place of its chunk is given out, and stays its own."""
    write, die = workers.write_part, once(tmp_path, kill_self)

    def die_or_write(location: Any, part: Any) -> Any:
        if location.start.tokens == 8:
            die()
        return write(location, part)

    monkeypatch.setattr(workers, "write_part", die_or_write)
    texts = [str(n) * 4 for n in range(10)]
    written = list(run_workers(lambda text: None, blocks(texts), workers=count))
    assert (tmp_path / "acted").exists()
    assert run_workers.text() == "".join(texts)
    assert sorted(chunk.number for chunk in written) == list(range(10))
    assert run_workers.placed == 10


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda path: path.unlink(), r"in.jsonl: cannot be read: No such file"),
        (lambda path: path.write_bytes(to_lines(["ab"])), "^the input changed while it was read$"),
    ],
)
def test_input_changes_before_a_chunk_is_done_again(
    tmp_path: Path,
    run_workers: Run,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], object],
    expected: str,
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(to_lines(["a"]))

    def die(*_: object) -> None:
        change(path)
        kill_self()

    monkeypatch.setattr(workers, "write_part", die)
    with pytest.raises(PreprocessError, match=expected):
        list(run_workers(lambda text: None, [Task(ByteRange(str(path), 0, path.stat().st_size))]))


def test_bytes_after_a_death(
    tmp_path: Path, stub: Callable, run: Callable, write_lines: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tool says that a worker died; its sidecar counts each document once."""
    monkeypatch.setattr("megatron_periln.data.preprocess.plan.CHUNK_BYTES", 1)
    die = once(tmp_path, kill_self)
    stub(lambda text: die() if text == "7" else None)
    lines = write_lines(tmp_path / "in.jsonl", [{"text": str(n)} for n in range(10)])
    code, stderr = run("--input", lines, "--output-prefix", tmp_path / "out", "--workers", 2)
    assert code == 0, stderr
    assert "note: worker process " in stderr
    assert json.loads((tmp_path / "out_text_document.json").read_text())["documents"] == 10
    assert np.fromfile(tmp_path / "out_text_document.bin", UINT16).tobytes().decode("utf-16") == "0123456789"
