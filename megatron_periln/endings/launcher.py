"""A rank whose launcher is gone: it has no one left who would end it, or start it anew."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from contextlib import suppress

__all__ = ["end_with_launcher", "wait_for_launcher"]

_SECONDS = 10  # between the same error on two ranks, one of which tells of it


def end_with_launcher() -> None:
    """End this process with status 1 as soon as the torchrun that has started it is gone.

    Without one, nothing is done: a shell may end before what it has started.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and hasattr(os, "pidfd_open"):
        threading.Thread(target=_wait_for_end_of, args=(os.getppid(),), daemon=True).start()


def wait_for_launcher() -> None:
    """Wait to be ended by torchrun, some seconds at most; without one, return at once.

    For a rank that leaves it to another to tell of an error: torchrun ends all ranks as soon as one has
    ended, and the other may not have spoken.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        time.sleep(_SECONDS)


def _wait_for_end_of(launcher: int) -> None:
    try:
        handle = os.pidfd_open(launcher)
    except ProcessLookupError:
        pass
    except OSError:  # a kernel without it, or a sandbox that forbids it
        return
    else:
        select.select([handle], [], [])
    # No step and no save: the ranks of other nodes may be gone as well. Children end with this process.
    if os.environ.get("LOCAL_RANK") == "0":
        with suppress(OSError):
            print(
                f"error: torchrun (process {launcher}) is gone, and its ranks end with it; what "
                "latest_checkpointed_iteration.txt names is complete: start again from there",
                file=sys.stderr,
                flush=True,
            )
    os._exit(1)
