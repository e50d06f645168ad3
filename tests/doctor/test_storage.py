"""Faults of the folder for checkpoints, its disk and its clock."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_periln import flag_files
from megatron_periln.doctor import probe, storage
from megatron_periln.doctor.rows import Row, as_table
from megatron_periln.doctor.timeouts import run_check

PAPER = Path(__file__).parents[2] / "examples/paper"


def test_healthy(doctor, tmp_path, data):
    flags = ["--device", "cpu", "--save", tmp_path / "new" / "save", "--data-path", 0.5, data, 0.5, data]
    code, rows, lines = doctor(*flags)
    assert (code, lines) == (0, [])
    assert {status for found in rows.values() for status, _ in found} == {"ok"}
    assert rows["free disk"][0][1].endswith("free, a checkpoint takes 0.01 GB")
    assert rows["datasets"] == [("ok", "1 of 8 tokens, 0.00 GB")]
    assert list((tmp_path / "new" / "save").iterdir()) == []


def test_full_disk(fails, mount):
    disk = mount("size=1m")
    cause = fails("save folder", save=disk, parameters=1)
    assert cause.startswith(f"{disk}: cannot be written: No space left on device; ")
    assert list(disk.iterdir()) == []


def test_read_only_folder(fails, mount):
    disk = mount("ro")
    assert fails("save folder", save=disk, parameters=1).startswith(
        f"{disk}: cannot be written: Read-only file"
    )


def test_folder_that_is_a_file(doctor, data):
    code, rows, _ = doctor("--device", "cpu", "--save", f"{data}.bin", "--data-path", data)
    assert code == 1
    assert rows["save folder"] == [("failed", f"{data}.bin: cannot be written: File exists")]


def test_folder_that_can_t_be_made_has_no_free_space(doctor, data):
    code, rows, lines = doctor("--device", "cpu", "--save", "/proc/x", "--data-path", data, "--parameters", 1)
    assert code == 1
    assert len(lines) == 1 and "save folder: /proc/x: cannot be written: " in lines[0]
    assert "free disk" not in rows


def test_no_inode_left(fails, mount, monkeypatch):
    disk = mount("size=100m,nr_inodes=2")
    (disk / "last").touch()
    monkeypatch.setattr(storage, "try_save_folder", lambda _: [])
    assert fails("free disk", save=disk).startswith(f"{disk}: no inode left; ")


@pytest.mark.parametrize(
    "parameters, kind, cause",
    [
        (1e9, "error", "0.10 GB free, a checkpoint takes 14.00 GB; free space"),
        (2.5e6, "warning", "0.10 GB free, a checkpoint takes 0.04 GB, all 4 take 0.14 GB; free space, save"),
    ],
)
def test_checkpoints_that_do_not_fit(fails, found, mount, parameters, kind, cause):
    disk = mount("size=100m")
    found["parameters"]["parameters"] = parameters
    flags = {"save": disk, "train-iters": 70, "save-interval": 20}
    assert f"{disk}: {cause}" in fails("free disk", kind=kind, **flags)


def test_checkpoints_that_fit(doctor, found, mount, data):
    found["parameters"]["parameters"] = 1.5e6
    flags = ["--save", mount("size=100m"), "--train-iters", 70, "--save-interval", 20, "--data-path", data]
    assert doctor("--device", "cpu", *flags)[::2] == (0, [])


def test_unknown_size(fails, found):
    found["parameters"] = {"parameters": None, "bytes_each": 12}
    assert "the flags don't give the model's size" in fails("free disk", kind="warning")


def test_a_size_without_embeddings(doctor, found, mount, data):
    found["parameters"]["without"] = "its embeddings"
    flags = ["--device", "cpu", "--save", mount("size=100m"), "--data-path", data]
    ((status, value),) = doctor(*flags)[1]["free disk"]
    assert status == "ok" and value.endswith("a checkpoint takes 0.01 GB without its embeddings")


@pytest.mark.parametrize(
    ("flags", "without"), [("--mock-data", "its embeddings"), ("--vocab-size 100276", "")]
)
def test_the_size_of_the_papers_400m(flags, without):
    """403 million without embeddings, as the paper counts."""
    size = probe.STEPS["parameters"](flag_files.expand([f"@{PAPER}/400m.flags", *flags.split()]))
    assert size["without"] == without
    embeddings = 0 if without else 2 * 100352 * 1024
    assert size["parameters"] - embeddings == pytest.approx(403e6, rel=0.01)


def test_slow_disk(fails, monkeypatch):
    """Its fsync takes ten seconds, by a clock that only fsync moves."""
    clock = SimpleNamespace(time=time.time, now=0.0, perf_counter=lambda: clock.now)
    fsync = os.fsync

    def slow(descriptor):
        clock.now += 10
        fsync(descriptor)

    monkeypatch.setattr(storage, "time", clock)
    monkeypatch.setattr(os, "fsync", slow)
    monkeypatch.setattr(storage, "TRIED_BYTES", 64 << 20)
    monkeypatch.setattr(storage, "SLOW", 100e6)
    assert "write and fsync 7 MB/s" in fails("save folder", kind="warning")


def test_disk_that_hangs(fails, monkeypatch):
    forever = threading.Event()
    monkeypatch.setattr(os, "fsync", lambda _: forever.wait())
    try:
        assert fails("save folder", timeout=1).startswith("no answer in 1 s; ")
    finally:
        forever.set()


def test_disk_that_forgets(fails, monkeypatch):
    """What is read is not what was written."""
    contents = iter([bytes(1 << 20), b""])
    monkeypatch.setattr(storage.secrets, "token_bytes", lambda size: b"x" * size)
    rename = storage.Path.replace

    def damage(self, target):
        moved = rename(self, target)
        moved.write_bytes(next(contents))
        return moved

    monkeypatch.setattr(storage.Path, "replace", damage)
    assert "reads back other bytes" in fails("save folder")


@pytest.mark.parametrize("skew, kind", [(60, "error"), (-60, "error"), (2, "warning"), (-2, "warning")])
def test_clock(fails, monkeypatch, skew, kind):
    clock = SimpleNamespace(time=lambda: time.time() + skew, perf_counter=time.perf_counter)
    monkeypatch.setattr(storage, "time", clock)
    apart, advice = fails("clock, file system", kind=kind).split(" s apart; ")
    assert float(apart) == pytest.approx(abs(skew), abs=1)
    assert "chronyc" in advice


def test_small_shared_memory(fails, monkeypatch):
    statvfs = os.statvfs

    def small(path):
        if path != "/dev/shm":
            return statvfs(path)
        return SimpleNamespace(f_bavail=16384, f_frsize=4096)

    monkeypatch.setattr(os, "statvfs", small)
    assert fails("shared memory", kind="warning").startswith("0.07 GB free in /dev/shm; start the container")


def test_a_check_that_breaks_is_a_row():
    def broken():
        yield Row("first", "ok", "")
        raise KeyError("second")

    assert [row.status for row in run_check("third", broken, 10)] == ["failed"]
    assert run_check("third", broken, 10)[0].value == "KeyError: 'second'"


def test_what_nodes_share_stands_once():
    rows = [Row("a", "ok", "1", node=node) for node in ("n1", "n2")]
    rows += [Row("b", "ok", "1", node="n1"), Row("b", "failed", "2", node="n2")]
    lines = [line.split() for line in as_table(rows).splitlines()[2:]]
    assert lines == [["a", "all", "2", "ok", "1"], ["b", "n1", "ok", "1"], ["b", "n2", "failed", "2"]]
