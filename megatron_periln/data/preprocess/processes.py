"""Processes that this one forks: each has a pipe to it, ends with it, and leaves Ctrl-C to it."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

__all__ = ["cause_of_death", "fork"]

_STOPPING = (signal.SIGINT, signal.SIGTERM)
"""The signals by which a run is stopped."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def fork(
    serve: Callable[..., None], *args: Any, inherited: Iterable[Connection] = ()
) -> tuple[BaseProcess, Connection]:
    """Fork a process, which shares what this one has loaded; return it and this one's end of its pipe.

    Parameters
    ----------
    serve
        What it does, with its end of the pipe and ``args``, until the pipe ends.
    args
        Not pickled.
    inherited
        This process's ends of other pipes.

    Raises
    ------
    OSError
        If no process can be started.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    ends = [ours, *inherited]
    process = context.Process(target=_begin, args=(serve, theirs, args, ends), daemon=True)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)  # until it has its own handlers
    try:
        process.start()
    except OSError:
        ours.close()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        theirs.close()  # the process's alone, so that the pipe ends when it dies
    return process, ours


def cause_of_death(process: BaseProcess) -> str:
    """Return how a process that has ended did so."""
    code = process.exitcode or 0
    if code >= 0:
        return f"ended with exit code {code}"
    reason = signal.Signals(-code).name
    if -code == signal.SIGKILL:
        reason += ", often sent by the kernel for lack of memory: use fewer --workers"
    return f"was killed by {reason}"


def _begin(
    serve: Callable[..., None], connection: Connection, args: tuple[Any, ...], inherited: list[Connection]
) -> None:
    # The pipe's end tells an idle process that its parent died; the kernel kills one that is busy.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Ctrl-C reaches every process of the terminal; the parent alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.freeze()  # what was made before the fork is not looked through again, nor its memory copied for that
    # The parent's ends of the pipes must be open in the parent only, or its death would go unnoticed.
    for end in inherited:
        end.close()
    with suppress(EOFError, OSError):
        serve(connection, *args)
