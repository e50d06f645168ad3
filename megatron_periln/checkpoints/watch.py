"""Says that a save takes long: a file system that hangs gives no error of its own."""

from __future__ import annotations

import threading
from pathlib import Path

__all__ = ["SaveWatch"]


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
