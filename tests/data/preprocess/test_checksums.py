"""Checksums of files that grow, and the hint to write what was hashed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_periln.data.preprocess import checksums
from megatron_periln.data.preprocess.checksums import RunningChecksums


@pytest.mark.parametrize("system", ["has it", "fails", "lacks it"])
def test_files_that_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str) -> None:
    """The system is asked to write each part once, and need not know how."""
    asked: list[tuple[int, int]] = []

    def sync_file_range(descriptor: int, start: object, size: object, flags: int) -> int:
        asked.append((start.value, size.value))  # type: ignore[attr-defined]
        return -1 if system == "fails" else 0

    library = SimpleNamespace() if system == "lacks it" else SimpleNamespace(sync_file_range=sync_file_range)
    monkeypatch.setattr(checksums.ctypes, "CDLL", lambda name: library)
    data = bytes(range(256)) * 8192  # two blocks
    running = RunningChecksums()
    for name in "ab":
        (tmp_path / name).write_bytes(data)
        for end in (10, 10, 1_500_000):
            running.extend(str(tmp_path / name), end)
    sums = {str(tmp_path / name): hashlib.sha256(data[:1_500_000]).hexdigest() for name in "ab"}
    assert running.result() == sums
    assert asked == ([] if system == "lacks it" else [(0, 10), (10, 1_499_990)] * 2)


def test_the_system_takes_the_hint(tmp_path: Path) -> None:
    """In its own words: the call is one that it knows."""
    path = tmp_path / "file"
    path.write_bytes(b"x" * 10_000)
    with path.open("rb") as stream:
        assert checksums._begin_to_sync(stream.fileno(), 0, 10_000) in (0, None)
    assert checksums._begin_to_sync(-1, 0, 1) in (-1, None)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    running = RunningChecksums()
    running.extend(str(tmp_path / "none"), 1)
    with pytest.raises(FileNotFoundError):
        running.result()
