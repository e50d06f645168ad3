"""Faults of the datasets, and where the flags may name them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest


def test_missing(fails, tmp_path):
    cause = fails("datasets", **{"data-path": tmp_path / "corpora"})
    assert cause.startswith(f"{tmp_path}/corpora: no such dataset (corpora.idx and corpora.bin are missing)")


def test_truncated(fails, data):
    os.truncate(f"{data}.bin", 15)
    assert "corpus.bin: truncated: 15 bytes, but corpus.idx needs 16" in fails("datasets")


def test_truncated_index(fails, data):
    os.truncate(f"{data}.idx", 60)
    assert "corpus.idx: truncated: 60 bytes" in fails("datasets")


def test_unreadable(fails, data, monkeypatch):
    """Root may read anything, so the file system says no."""
    open_ = Path.open

    def refuse(self, *args, **options):
        if self.suffix == ".bin":
            raise PermissionError(13, "Permission denied")
        return open_(self, *args, **options)

    monkeypatch.setattr(Path, "open", refuse)
    assert fails("datasets").startswith(f"{data}: cannot be read: Permission denied; ")


def test_every_fault_of_a_blend_is_told(doctor, data, tmp_path):
    absent = [f"{tmp_path}/absent{number}" for number in range(2)]
    code, rows, lines = doctor("--device", "cpu", "--data-path", 1, absent[0], 2, data, 3.5, absent[1])
    assert code == 1
    assert [status for status, _ in rows["datasets"]] == ["failed", "failed"]
    assert sum("no such dataset" in line for line in lines) == 2


@pytest.mark.parametrize("flag", ["--train-data-path", "--data-args-path", "--per-split-data-args-path", "@"])
def test_named_elsewhere(doctor, data, tmp_path, flag):
    named = {
        "--train-data-path": [flag, 1, data],
        "--data-args-path": [flag, tmp_path / "file"],
        "--per-split-data-args-path": [flag, tmp_path / "file.json"],
        "@": [f"@{tmp_path / 'flags'}"],
    }[flag]
    (tmp_path / "file").write_text(f"1 {data}\n")
    (tmp_path / "file.json").write_text(json.dumps({"train": ["1", str(data)], "valid": None}))
    (tmp_path / "flags").write_text(f"--device cpu  # a laptop\n--data-path {data}\n")
    assert doctor("--device", "cpu", *named)[1]["datasets"] == [("ok", "1 of 8 tokens, 0.00 GB")]
    Path(f"{data}.bin").unlink()
    assert doctor("--device", "cpu", *named)[1]["datasets"][0][0] == "failed"


def test_none(doctor):
    assert doctor("--device", "cpu")[1]["datasets"] == [("warning", "not checked")]
    assert doctor("--device", "cpu", "--mock-data")[1]["datasets"] == [("ok", "mock data")]
