"""Outputs are complete or absent, whatever ends the run."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_periln.data.writer import EncodedDocuments, open_writers
from tests.data.characters import outputs


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
