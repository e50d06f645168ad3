"""Wall time, CPU time and memory of a command with all the processes it starts."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Measurement", "MeasurementError", "measure"]

_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_INTERVAL = 0.05


class MeasurementError(Exception):
    """The command failed or ran too long."""


@dataclass(frozen=True)
class Measurement:
    """What a command took.

    Parameters
    ----------
    seconds
        Wall time, from its start to its end.
    cpu_seconds
        User and system time of its process and all descendants.
    peak_bytes
        The largest sum of the proportional set sizes (PSS) of its processes: memory that they share
        counts once, mapped files count. None if it was not sampled.
    peak_anonymous_bytes
        The same without mapped files.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int | None = None
    peak_anonymous_bytes: int | None = None


def measure(
    command: list[str], environment: dict[str, str], log: Path, *, memory: float = 0.0, timeout: float
) -> Measurement:
    """Run ``command``, which must be this process's only child.

    Parameters
    ----------
    command, environment
        The command, and what it has in its environment beside this process's.
    log
        Takes its output.
    memory
        The share of one core that sampling its memory may take: reading a PSS walks page tables, at
        20 ms a GB. 0 does not sample, 1 samples every 50 ms.
    timeout
        Seconds until it is killed.

    Raises
    ------
    MeasurementError
        If it fails or runs too long.
    """
    # What outlives its parent becomes this process's child, and is counted.
    ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    sampler = _Sampler(memory)
    with log.open("wb") as output:
        started = time.perf_counter()
        process = subprocess.Popen(
            command,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        killer = threading.Timer(timeout, os.killpg, (process.pid, signal.SIGKILL))
        killer.start()
        sampler.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - started
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            killer.cancel()
            sampler.stop()
    process.returncode = os.waitstatus_to_exitcode(status)
    cpu_seconds = usage.ru_utime + usage.ru_stime + _reap()
    if process.returncode:
        tail = log.read_text(errors="replace")[-2000:]
        raise MeasurementError(f"{' '.join(command)}\nended with {process.returncode}:\n{tail}")
    return Measurement(seconds, cpu_seconds, *((sampler.peak, sampler.peak_anonymous) if memory else ()))


def _reap(patience: float = 10.0) -> float:
    """Wait for what the command left behind, end what stays, and return their CPU seconds."""
    deadline, seconds = time.monotonic() + patience, 0.0
    while True:
        try:
            pid, _, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return seconds
        if pid:
            seconds += usage.ru_utime + usage.ru_stime
            continue
        if time.monotonic() > deadline:
            for descendant in _descendants(os.getpid()):
                os.kill(descendant, signal.SIGKILL)
        time.sleep(0.01)


class _Sampler:
    def __init__(self, share: float) -> None:
        self.peak = self.peak_anonymous = 0
        self._share = share
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        if self._share:
            self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._share:
            self._thread.join()

    def _run(self) -> None:
        pause = _INTERVAL
        while not self._stopped.wait(pause):
            before = time.thread_time()
            sizes = [_set_size(pid) for pid in _descendants(os.getpid())]
            self.peak = max(self.peak, sum(size for size, _ in sizes))
            self.peak_anonymous = max(self.peak_anonymous, sum(size for _, size in sizes))
            spent = time.thread_time() - before
            pause = max(_INTERVAL, spent / self._share - spent)


def _descendants(pid: int) -> Iterator[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [child for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return
    for child in map(int, children):
        yield child
        yield from _descendants(child)


def _set_size(pid: int) -> tuple[int, int]:
    """Return the PSS of a process and the part of it that is not mapped files, in bytes."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return 0, 0
    sizes = {name: int(size.split()[0]) for name, size in (line.split(":") for line in lines)}
    anonymous = sizes.get("Pss_Anon", 0) + sizes.get("Pss_Shmem", 0)
    return 1024 * sizes.get("Pss", 0), 1024 * anonymous
