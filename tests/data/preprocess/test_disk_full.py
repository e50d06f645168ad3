"""A full disk is one clear error, and what was done is kept."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_periln.data.preprocess import driver
from megatron_periln.data.preprocess.partial_outputs import PartialOutputs
from tests.data.preprocessing import FILES, by_megatron, names, read, to_lines

TEXTS = [f"{n} {'x' * 9_000}" for n in range(100)]
RESUME = "No space left on device; what is done is kept: go on with --resume"


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def flags(tmp_path: Path, stub: Callable, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    monkeypatch.setattr("megatron_periln.data.preprocess.plan.CHUNK_BYTES", 20_000)
    stub(lambda text: None)
    (tmp_path / "in.jsonl").write_bytes(to_lines(TEXTS))
    return ["--input", tmp_path / "in.jsonl", "--output-prefix", tmp_path / "out", "--workers", 2]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def finish(tmp_path: Path, run: Callable, flags: list[object], prefix: Path) -> None:
    """Go on, now that there is space, and check the bytes."""
    code, stderr = run(*flags, "--resume")
    assert code == 0, stderr
    assert read(f"{prefix}_text_document") == by_megatron(tmp_path / "reference", TEXTS)
    assert names(prefix.parent) == FILES


def test_small_disk(
    tmp_path: Path, small_disk: Path, run: Callable, refused: Callable[..., str], flags: list[object]
) -> None:
    """The datasets take 1.8 MB; a worker's file or the journal, whichever comes first, cannot be written."""
    flags += ["--output-prefix", small_disk / "out"]
    partial = f"error: {small_disk}/out.partial"
    messages = {f"{where}: cannot be written: {RESUME}" for where in (partial, f"{partial}/text_00000")}
    for resume in ([], ["--resume"], ["--resume"], ["--resume"]):  # while there is no space
        assert refused(*flags, *resume) in messages
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    finish(tmp_path, run, flags, small_disk / "out")


def test_data_cannot_be_written(
    tmp_path: Path,
    run: Callable,
    refused: Callable[..., str],
    flags: list[object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A write falls short, and the next one fails."""
    with monkeypatch.context() as patch:
        pwrite = os.pwrite

        def fall_short(descriptor: int, data: memoryview, at: int) -> int:
            if at > 500_000:
                full()
            return pwrite(descriptor, data[: max(len(data) // 2, 1)], at)

        patch.setattr(os, "pwrite", fall_short)
        message = refused(*flags)
    assert message == f"error: {tmp_path}/out.partial/text_00000: cannot be written: {RESUME}"
    finish(tmp_path, run, flags, tmp_path / "out")


def test_journal_cannot_be_written(
    tmp_path: Path,
    run: Callable,
    refused: Callable[..., str],
    flags: list[object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Half of a line is there, and the rest cannot be written when the file is closed either."""

    class FullStream:
        def __init__(self, stream: Any) -> None:
            self._stream, self._lines = stream, 0

        def write(self, line: str) -> None:
            self._lines += 1
            self._stream.write(line if self._lines < 9 else line[: len(line) // 2])
            if self._lines == 9:
                self._stream.flush()
                full()

        def flush(self) -> None:
            self._stream.flush()

        def close(self) -> None:
            self._stream.close()
            full()

    with monkeypatch.context() as patch:
        open_ = Path.open

        def open_on_a_full_disk(path: Path, *args: Any, **options: Any) -> Any:
            stream = open_(path, *args, **options)
            return FullStream(stream) if path == tmp_path / "out.partial" / "journal" else stream

        patch.setattr(Path, "open", open_on_a_full_disk)
        message = refused(*flags)
    assert message == f"error: {tmp_path}/out.partial: cannot be written: {RESUME}"
    finish(tmp_path, run, flags, tmp_path / "out")


@pytest.mark.parametrize("call", range(10))
def test_finalizing_fails(
    tmp_path: Path,
    run: Callable,
    refused: Callable[..., str],
    flags: list[object],
    monkeypatch: pytest.MonkeyPatch,
    call: int,
) -> None:
    """At any of the steps after all was encoded."""
    calls = 0
    failed = False
    with monkeypatch.context() as patch:
        mark_complete = PartialOutputs.mark_complete

        def complete_and_fail(self: PartialOutputs) -> None:
            for name in ("fsync", "replace", "rename"):
                patch.setattr(os, name, fail_at_one(getattr(os, name)))
            mark_complete(self)

        def fail_at_one(step: Callable) -> Callable:
            def step_or_fail(*args: Any, **options: Any) -> Any:
                nonlocal calls, failed
                calls += 1
                if calls == call + 1:
                    failed = True
                    full()
                return step(*args, **options)

            return step_or_fail

        patch.setattr(PartialOutputs, "mark_complete", complete_and_fail)
        code, stderr = run(*flags)
    assert failed
    assert (code, stderr.endswith(f"{RESUME}\n")) == (1, True), stderr
    assert stderr.count("\n") == 1
    if call > 3:  # all was on the disk, and noted
        monkeypatch.setattr(driver, "encode_and_write", lambda *_, **__: pytest.fail("encoded again"))
    finish(tmp_path, run, flags, tmp_path / "out")


def test_nothing_can_be_written(
    tmp_path: Path, refused: Callable[..., str], flags: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even the description of the run: nothing stays."""
    monkeypatch.setattr(os, "fsync", full)
    message = refused(*flags)
    assert message == f"error: {tmp_path}/out.partial: cannot be written: No space left on device"
    assert names(tmp_path) == []
