"""Commands that may hang for ever."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from contextlib import suppress

__all__ = ["run_command"]

_SECONDS_TO_DIE = 1


def run_command(command: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """Run a command and return what it said.

    One that a driver holds in the kernel can't be killed: it is left behind, where `subprocess.run` would
    wait for it.

    Raises
    ------
    subprocess.TimeoutExpired
        If it doesn't end in time, with what it had said.
    """
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    try:
        stdout, stderr = process.communicate(timeout=seconds)
    except BaseException:
        process.kill()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_SECONDS_TO_DIE)
        raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)
