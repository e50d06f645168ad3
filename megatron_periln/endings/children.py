"""The processes that a rank starts, such as data workers: none outlives it, or keeps it waiting.

Python, at its end, asks its children to end by SIGTERM and waits for them. Those of a rank that heeds
``--exit-signal-handler`` have inherited its handler, which only takes note: both would wait forever.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading

__all__ = ["are_ending", "be_a_child", "end_children", "keep_no_orphans"]

_PR_SET_PDEATHSIG = 1

_registered = _ending = False
# The process that is forking, if its main thread does: Linux sends the signal as the thread ends.
_parent = 0


def end_children() -> None:
    """End every process that this one has started by `multiprocessing`, and wait until they are gone.

    What a run still needs of them it has had before: Megatron waits for the last save.
    """
    global _ending
    _ending = True
    children = multiprocessing.active_children()
    if children:
        # torch's handler raises an error for each data worker that is killed, and what torch does at the end
        # of Python would wait for messages that they were sending.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if data := sys.modules.get("torch.utils.data._utils"):
            data.python_exit_status = True  # type: ignore[attr-defined]
    for child in children:
        child.kill()
    for child in children:
        child.join()


def are_ending() -> bool:
    """Tell whether this process is ending those that it has started."""
    return _ending


def keep_no_orphans() -> None:
    """Have the kernel kill what this process forks from now on, as soon as this process is gone.

    Also if that is killed and can't see to anything. Systems other than Linux have no such order. With
    ``--inprocess-restart`` nothing is done: the process that nvidia-resiliency-ext starts beside a rank is to
    tell the others of its end.
    """
    global _registered
    if _registered or not sys.platform.startswith("linux") or "--inprocess-restart" in sys.argv:
        return
    _registered = True
    os.register_at_fork(before=_note_parent, after_in_child=_end_with_forking_process)


def be_a_child() -> None:
    """Be a process that a rank has spawned, not forked: inherit what a forked one does.

    torchrun and SLURM signal all processes of a rank. What it has started is to leave the answer to the rank,
    which needs it for its last save.
    """
    if sys.platform.startswith("linux"):
        _end_with(os.getppid())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if "--exit-signal-handler" in sys.argv:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _note_parent() -> None:
    global _parent
    _parent = os.getpid() if threading.current_thread() is threading.main_thread() else 0


def _end_with_forking_process() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the rank sees to it
    if _parent:
        _end_with(_parent)


def _end_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before
        os._exit(1)
