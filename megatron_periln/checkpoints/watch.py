"""Says that a save takes long, and ends a rank whose writer is gone: neither gives an error of its own."""

from __future__ import annotations

import multiprocessing.connection
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from megatron_periln.endings import children

__all__ = ["SaveWatch", "watch_writer"]


class SaveWatch:
    """Prints a line when a save has used up a quarter of the ranks' patience, a half, and three.

    The line is printed without touching the file system, which may hang for good.

    Parameters
    ----------
    minutes
        ``--distributed-timeout-minutes``: how long a rank waits for another before it ends the run.
    """

    def __init__(self, minutes: float) -> None:
        self._minutes = minutes
        self._saved = threading.Event()

    def begin(self, folder: Path) -> None:
        """Watch over the save to ``folder``, and no longer over the one before."""
        self.end()
        self._saved = threading.Event()
        threading.Thread(target=self._tell, args=(folder, self._saved), daemon=True).start()

    def end(self) -> None:
        """See that the checkpoint is saved."""
        self._saved.set()

    def _tell(self, folder: Path, saved: threading.Event) -> None:
        quarter = self._minutes * 15
        for passed in (1, 2, 3):
            if saved.wait(quarter):
                return
            print(
                f"--save {folder.parent}: {folder.name} is not on the disk after {passed * quarter:.0f} s; "
                f"is the file system slow, or does it hang? A rank that waits {self._minutes:g} minutes for "
                "another ends the run; --distributed-timeout-minutes gives it longer",
                flush=True,
            )


def watch_writer(process: Any) -> None:
    """End this rank as soon as the process that writes its checkpoints ends otherwise than it is told to.

    Parameters
    ----------
    process
        The `multiprocessing.Process`.
    """
    threading.Thread(target=_wait_for_writer, args=(process,), daemon=True).start()


def _wait_for_writer(process: Any) -> None:
    multiprocessing.connection.wait([process.sentinel])
    while (status := process.exitcode) is None:  # another thread, which waits for it too, has its status
        time.sleep(0.01)
    if status == 0 or children.are_ending():
        return
    how = f"by signal {-status}: did memory run short?" if status < 0 else f"with status {status}"
    print(
        f"error: rank {os.environ.get('RANK', 0)}: the process that writes its checkpoints has ended {how}; "
        "what latest_checkpointed_iteration.txt names is complete: start again from there",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)  # the main thread may wait for that process, and for other ranks
