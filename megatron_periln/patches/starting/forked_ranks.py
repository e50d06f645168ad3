"""Ranks that are forked from their launcher, and so import torch once for all of them."""

from __future__ import annotations

import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

from megatron_periln.patches.registry import changes

__all__ = ["Rank", "fork_ranks", "start_as_ranks"]

_POLL = 0.02  # seconds


@dataclass
class Rank:
    """A process that waits to become a rank, and then is one; to torchrun it is like a `subprocess.Popen`.

    Attributes
    ----------
    pid
        Its process.
    launcher
        Where it is told its arguments; closed from then on.
    """

    pid: int
    launcher: socket.socket
    args: Sequence[str] = ()
    returncode: int | None = field(default=None, init=False)

    def poll(self) -> int | None:
        """Return its status, as `subprocess.Popen` gives it; None while it runs."""
        if self.returncode is None:
            with suppress(ChildProcessError):
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; raise `subprocess.TimeoutExpired` if that takes more than ``timeout`` seconds."""
        end = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if end is not None and time.monotonic() >= end:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            time.sleep(_POLL)
        return status

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send it SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send it SIGKILL."""
        self.send_signal(signal.SIGKILL)


def fork_ranks(number: int, module: str) -> list[Rank]:
    """Fork processes that wait to become ranks.

    In such a process this does not return: it runs ``module``, as ``python -m`` does, once
    `start_as_ranks` says with which arguments and environment, and ends if this process does before.
    None is forked where this process has threads, which a fork would lose.
    """
    if len(list(Path("/proc/self/task").iterdir())) > 1:
        return []
    ranks: list[Rank] = []
    for _ in range(number):
        ours, its = socket.socketpair()
        if not (pid := os.fork()):
            for other in (*(rank.launcher for rank in ranks), ours):
                other.close()
            _wait_and_run(its, module)
        its.close()
        ranks.append(Rank(pid, ours))
    return ranks


def _wait_and_run(launcher: socket.socket, module: str) -> None:
    os.setsid()  # as torchrun starts its ranks: a Ctrl-C is the launcher's
    with launcher, launcher.makefile("rb") as messages:
        try:
            arguments, environment, outputs = pickle.load(messages)
        except EOFError:
            os._exit(0)
        for descriptor, path in outputs.items():
            file = os.open(path, os.O_WRONLY)
            os.dup2(file, descriptor)
            os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [module, *arguments]
    if not sys.flags.safe_path:
        sys.path[0] = str(Path.cwd())
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(write_through=True)  # type: ignore[union-attr]  # python -u
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    sys.exit()


@changes(
    "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler.Popen",
    why="torchrun imports torch to start ranks, which import it again, 1.7 s each. It can't hand it on: its "
    "`--start-method fork` is for functions",
    until="patches/test_forked_ranks.py::test_upstream_still_starts_ranks_by_the_name_of_popen",
)
def start_as_ranks(waiting: list[Rank], module: str) -> None:
    """Let torchrun start the processes of `fork_ranks` as its ranks; what it starts besides, as ever."""
    popen = subprocess_handler.Popen
    usual = (sys.executable, "-u", "-m", module)

    def start(
        args: Sequence[str], env: dict[str, str], stdout: Any = None, stderr: Any = None, **kwargs: Any
    ) -> Any:
        while waiting and tuple(args[:4]) == usual:
            rank = waiting.pop(0)
            rank.args = args
            outputs = {number: file.name for number, file in ((1, stdout), (2, stderr)) if file is not None}
            with rank.launcher, suppress(BrokenPipeError, ConnectionResetError):  # one that was killed
                rank.launcher.sendall(pickle.dumps((list(args[4:]), dict(env), outputs)))
                return rank
        return popen(args=args, env=env, stdout=stdout, stderr=stderr, **kwargs)

    subprocess_handler.Popen = start  # type: ignore[assignment, misc]
