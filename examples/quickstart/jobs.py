"""Commands of the quickstart, and what the logs of training jobs tell while they run."""

from __future__ import annotations

import math
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

_ITERATION = re.compile(r"iteration +(\d+)/ *(\d+) .*lm loss: ([\dE.+-]+)")
_VALIDATION = re.compile(
    r"validation loss at iteration (\d+) (?:on validation set )?\| lm loss value: ([\dE.+-]+)"
)
_SHOWN = 4
"""How often a run is shown where lines stay, as in a file."""


def say(text: str) -> None:
    """Print a step of the tour."""
    print(f"\n>> {text}", flush=True)


@dataclass
class Progress:
    """What the log of a training job has told so far.

    Attributes
    ----------
    validation
        The last validation loss.
    clock
        Gives the time, in seconds.
    """

    validation: float = math.nan
    clock: Callable[[], float] = time.monotonic
    _first: tuple[int, float] | None = None

    def read(self, line: str) -> str | None:
        """Take in a line of the log; return what is worth showing of it."""
        if match := _VALIDATION.search(line):
            self.validation = float(match[2])
            return None
        if not (match := _ITERATION.search(line)):
            return None
        done, total = int(match[1]), int(match[2])
        now = self.clock()
        self._first = self._first or (done, now)
        begun, start = self._first
        left = f"{(now - start) / (done - begun) * (total - done):.0f} s left" if done > begun else ""
        bar = "#" * round(30 * done / total)
        return f"[{bar:<30}] {done}/{total}  loss {float(match[3]):.3f}  {left}".rstrip()


@dataclass
class Job:
    """A training run: its flags, on how many ranks, and where its log goes."""

    name: str
    arguments: Sequence[str]
    log: Path
    ranks: int = 1
    progress: Progress = field(default_factory=Progress)

    @property
    def command(self) -> list[str]:
        """What runs it; the launcher forks the ranks, which so import torch no second time."""
        launch = [sys.executable, "-m", "megatron_periln.launch", "--standalone"]
        launch += ["--nproc-per-node", str(self.ranks)]
        return [*launch, "-m", "megatron_periln.pretrain", *self.arguments]


class Board:
    """A line for each of the runs that go on at the same time: rewritten in a terminal, else now and then."""

    def __init__(self, names: Sequence[str]) -> None:
        self.lines = dict.fromkeys(names, "starting")
        self.seen = dict.fromkeys(names, 0)
        self.inline = sys.stdout.isatty()
        self.lock = threading.Lock()
        if self.inline:
            self._print_all()

    def show(self, name: str, line: str, *, always: bool = False) -> None:
        """Show the progress of a run; ``always`` also where only some lines are shown."""
        with self.lock:
            self.lines[name] = line
            if self.inline:
                print(f"\x1b[{len(self.lines)}A", end="")
                self._print_all()
                return
            self.seen[name] += not always
            if always or self.seen[name] % _SHOWN == 0:
                print(f"   {name:<8}{line}", flush=True)

    def _print_all(self) -> None:
        for name, line in self.lines.items():
            print(f"\x1b[2K   {name:<8}{line}", flush=True)


def run(*commands: tuple[list[str], Path]) -> None:
    """Run commands at the same time, each with its output in a log; exit with the log of one that fails."""
    _together([partial(_finish, command, log) for command, log in commands])


def train(*runs: Sequence[Job]) -> None:
    """Train at the same time, each run on a line, its jobs one after the other.

    Exit with the last lines of a job that fails.
    """
    for job in (job for jobs in runs for job in jobs):
        print("   $ " + shlex.join(job.command), flush=True)
    board = Board([jobs[0].name for jobs in runs])

    def follow(jobs: Sequence[Job], stop: threading.Event) -> None:
        for number, job in enumerate(jobs):
            if number:
                board.show(job.name, "stopped; resumes from its checkpoint", always=True)
            for line in _follow(job.command, job.log, stop):
                if shown := job.progress.read(line):
                    board.show(job.name, shown)
            if stop.is_set():
                return
        board.show(jobs[-1].name, f"done: validation loss {jobs[-1].progress.validation:.3f}", always=True)

    _together([partial(follow, jobs) for jobs in runs])


def _finish(command: list[str], log: Path, stop: threading.Event) -> None:
    for _ in _follow(command, log, stop):
        pass


def _together(calls: Sequence[Callable[[threading.Event], object]]) -> None:
    """Call functions at the same time; where one fails, have the others stop, and fail as it did."""
    stop = threading.Event()
    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(call, stop) for call in calls]
        wait(futures, return_when=FIRST_EXCEPTION)
        stop.set()
        for future in futures:
            future.result()


def _follow(command: list[str], log: Path, stop: threading.Event) -> Iterator[str]:
    """Run a command; append its output to ``log`` and yield its lines. Exit if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    with (
        log.open("a") as output,
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            output.write(line)
            output.flush()
            yield line
            if stop.is_set():
                process.terminate()
    if process.returncode and not stop.is_set():
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
        raise SystemExit(f"{tail}\n\n{shlex.join(command[:4])} ... failed; the whole log is {log}")
