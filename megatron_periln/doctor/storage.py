"""The folder for checkpoints: whether it can be written, how fast, the room there, and its clock."""

from __future__ import annotations

import math
import os
import secrets
import socket
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from megatron_periln.doctor.rows import Row
from megatron_periln.files import sync

__all__ = [
    "SLOW",
    "TRIED_BYTES",
    "check_checkpoint_room",
    "check_shared_memory",
    "clock_row",
    "try_save_folder",
]

TRIED_BYTES = 64 << 20
"""The size of the file that is tried."""

SLOW = 100e6
"""Bytes a second below which saving checkpoints holds up training."""

_SKEW_WARNING, _SKEW_FAILED = 0.5, 10.0
"""Seconds: logs get out of order; leases and ``--exit-duration-in-mins`` go wrong."""

_SHARED_MEMORY = 1 << 30
"""What NCCL and data-loader workers may need of /dev/shm; containers often start with 64 MiB."""


def try_save_folder(folder: Path) -> Iterator[Row]:
    """Write, sync, rename and read a file in ``folder``, as checkpoints are; compare its clock."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield from _try_file(folder / f".doctor.{socket.gethostname()}.{os.getpid()}")
    except OSError as error:
        yield Row(
            "save folder",
            "failed",
            f"{folder}: cannot be written: {error.strerror or error}",
            "fix its permissions or its mount, or give another --save",
        )


def _try_file(path: Path) -> Iterator[Row]:
    temporary = path.with_name(f"{path.name}.tmp")
    content = secrets.token_bytes(1 << 20)  # nothing that compresses
    try:
        started = time.perf_counter()
        with temporary.open("wb") as stream:
            for _ in range(TRIED_BYTES // len(content)):
                stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        written = time.perf_counter()
        temporary.replace(path)
        sync(path.parent)
        renamed = time.perf_counter()
        os.utime(path)  # the file server's clock, where there is one
        skew = path.stat().st_mtime - time.time()
        with path.open("rb") as stream:
            same = all(block == content for block in iter(lambda: stream.read(len(content)), b""))
            same = same and stream.tell() == TRIED_BYTES
    finally:
        temporary.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    speed = TRIED_BYTES / max(written - started, 1e-9)
    value = f"write and fsync {speed / 1e6:,.0f} MB/s, rename {1e3 * (renamed - written):.1f} ms"
    if not same:
        yield Row(
            "save folder",
            "failed",
            f"{path.parent}: reads back other bytes than were written",
            "take this file system out of use",
        )
    elif speed < SLOW:
        yield Row(
            "save folder", "warning", f"{path.parent}: {value}", "give a faster file system, or --async-save"
        )
    else:
        yield Row("save folder", "ok", value)
    yield clock_row("clock, file system", skew)


def clock_row(check: str, skew: float, whose: str = "") -> Row:
    """Return the row for clocks that differ by ``skew`` seconds; ``whose`` says which, if it matters."""
    size = abs(skew)
    value = f"{size:.3f} s apart"
    if size < _SKEW_WARNING:
        return Row(check, "ok", value)
    status: Literal["warning", "failed"] = "failed" if size >= _SKEW_FAILED else "warning"
    return Row(check, status, value + whose, "synchronize the clocks: chronyc tracking, or timedatectl")


def check_checkpoint_room(
    options: Namespace, checkpoint_bytes: int | str, without: str = ""
) -> Iterator[Row]:
    """Compare the free space with one checkpoint, and with all that the flags will write.

    ``checkpoint_bytes`` is the size of a checkpoint ``without`` some of it, or says why it is unknown. There
    is no row where
    `try_save_folder` could not make the folder.
    """
    folder = Path(options.save)
    if not folder.is_dir():
        return
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    if disk.f_files and not disk.f_favail:
        yield Row("free disk", "failed", f"{folder}: no inode left", "delete files, or give another --save")
    elif isinstance(checkpoint_bytes, str):
        yield Row(
            "free disk",
            "warning",
            f"{_gb(free)} free, not compared with a checkpoint: {checkpoint_bytes}",
            "give --parameters",
        )
    else:
        yield _room(free, checkpoint_bytes, without, options)


def _room(free: int, checkpoint: int, without: str, options: Namespace) -> Row:
    value = (
        f"{_gb(free)} free, a checkpoint takes {_gb(checkpoint)}{f' without {without}' if without else ''}"
    )
    if free < checkpoint:
        return Row("free disk", "failed", f"{options.save}: {value}", "free space, or give another --save")
    if options.train_iters and options.save_interval:
        count = math.ceil(options.train_iters / options.save_interval)
        value += f", all {count} take {_gb(count * checkpoint)}"
        if free < count * checkpoint:
            return Row(
                "free disk",
                "warning",
                f"{options.save}: {value}",
                "free space, save less often, or delete old checkpoints in time",
            )
    return Row("free disk", "ok", value)


def check_shared_memory() -> Iterator[Row]:
    """Look at /dev/shm, through which processes of a node exchange data."""
    disk = os.statvfs("/dev/shm")
    size = disk.f_bavail * disk.f_frsize
    if size < _SHARED_MEMORY:
        yield Row(
            "shared memory",
            "warning",
            f"{_gb(size)} free in /dev/shm",
            "start the container with --ipc=host or a larger --shm-size",
        )
    else:
        yield Row("shared memory", "ok", f"{_gb(size)} free in /dev/shm")


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
