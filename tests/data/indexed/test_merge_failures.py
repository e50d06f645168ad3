"""Where a merge fails, nothing is left; where there was a dataset, it stays."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Buffer, Callable
from pathlib import Path
from typing import BinaryIO, cast

import pytest

from megatron_periln.data.indexed.format import check_indexed_dataset
from megatron_periln.data.indexed.merge import append_file, merge_datasets
from tests.data.companions import (
    SMALL,
    TOOLS,
    build,
    content,
)

TOOL = TOOLS / "merge_datasets.py"


def test_what_a_killed_merge_left_goes(tmp_path: Path, pair: list[str], run_merge: Callable) -> None:
    """With the next merge to the same name; not what a process holds, nor what has another name."""
    killed = (
        "import os, signal, sys; from megatron_periln.data.indexed import merge\n"
        "merge.append_file = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "merge.merge_datasets(sys.argv[1:3], sys.argv[3])"
    )
    output = str(tmp_path / "out")
    ended = subprocess.run([sys.executable, "-c", killed, *pair, output], cwd=TOOLS.parent, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert {path.suffixes[0] for path in tmp_path.glob("out.*.tmp")} == {".bin", ".idx"}
    other, held = tmp_path / "out.bin.other.tmp", tmp_path / "out.idx.1.tmp"
    other.touch()
    with held.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert run_merge("--inputs", *pair, "--output-prefix", output)[0] == 0
    assert sorted(tmp_path.glob("out*.tmp")) == [other, held]


def full(*_: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("function", ["os.copy_file_range", "os.fsync"])
def test_full_disk(
    tmp_path: Path, pair: list[str], merge_refused: Callable, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    """Nothing is left, and an older dataset stays as it was."""
    build(tmp_path / "old", SMALL)
    monkeypatch.setattr(function, full)
    for output in ("out", "old"):
        error = merge_refused("--inputs", *pair, "--output-prefix", tmp_path / output, "--overwrite")
        assert f"{output}.bin: cannot be written: No space left on device; nothing was left" in error


def test_file_size_limit(tmp_path: Path) -> None:
    """The kernel's own refusal, in a process of its own."""
    prefixes = [build(tmp_path / name, [[[1] * 4000]]) for name in ("a", "b")]
    result = subprocess.run(
        [sys.executable, str(TOOL), "--inputs", *prefixes, "--output-prefix", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)),
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.endswith("out.bin: cannot be written: File too large; nothing was left there\n")
    assert not list(tmp_path.glob("out*"))


def test_no_index_stands_with_another_bin(
    tmp_path: Path, pair: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each step there is either the whole dataset or no index."""
    merge_datasets(pair[:1], str(tmp_path / "out"))
    merge_datasets(pair, str(tmp_path / "expected"))
    replace, seen = Path.replace, []

    def watch(source: Path, target: Path) -> Path:
        seen.append((target.suffix, (tmp_path / "out.idx").exists()))
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", watch)
    merge_datasets(pair, str(tmp_path / "out"), overwrite=True)
    assert seen == [(".bin", False), (".idx", False)]
    assert content(tmp_path / "out") == content(tmp_path / "expected")


def test_an_interrupt_leaves_nothing(
    tmp_path: Path, pair: list[str], run_merge: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_periln.data.indexed.merge.append_file", interrupt)
    code, _, stderr = run_merge("--inputs", *pair, "--output-prefix", tmp_path / "out")
    assert (code, stderr) == (130, "interrupted: nothing was written\n")
    assert not list(tmp_path.glob("out*"))


def test_an_input_that_shrinks(
    tmp_path: Path, pair: list[str], merge_refused: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.copy_file_range", lambda *_: 0)
    monkeypatch.setattr("os.fstat", lambda _: os.stat_result([0] * 6 + [13] + [0] * 3))
    assert "a.bin: became shorter" in merge_refused("--inputs", *pair, "--output-prefix", tmp_path / "out")


def test_short_copies_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the kernel nor the target need take all that they are given."""

    class Short(io.FileIO):
        def write(self, block: Buffer, /) -> int:
            return super().write(memoryview(block)[:3])

    source, left = tmp_path / "source", [2, 4]
    source.write_bytes(bytes(range(100)))
    copy = os.copy_file_range
    monkeypatch.setattr("os.copy_file_range", lambda a, b, most: copy(a, b, left.pop()) if left else 0)
    with Short(tmp_path / "target", "w") as target:
        append_file(source, cast(BinaryIO, target))
    assert (tmp_path / "target").read_bytes() == source.read_bytes()
    assert not left


def test_few_files_are_open_however_many_are_merged(tmp_path: Path) -> None:
    prefixes = [build(tmp_path / f"part{number}", SMALL) for number in range(50)]
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.dup(0) for _ in range(12)]
    for descriptor in taken:
        os.close(descriptor)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (taken[-1] + 1, limit[1]))
        merged = merge_datasets(prefixes, str(tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert merged.datasets == 50
    check_indexed_dataset(tmp_path / "out")
