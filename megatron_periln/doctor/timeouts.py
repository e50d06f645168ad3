"""Checks and commands that may hang for ever, each given some seconds."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress

from megatron_periln.doctor.rows import Row
from megatron_periln.errors import UsageError

__all__ = ["Check", "run_check", "run_within"]

Check = Callable[[], Iterable[Row]]

_SECONDS_TO_DIE = 1


def run_check(name: str, check: Check, seconds: float) -> list[Row]:
    """Return the rows of ``check``, or one that failed if it raises, or doesn't end in time.

    A check that hangs, on a dead file server for example, is left behind in a thread.
    """
    rows: list[Row] = []

    def run() -> None:
        try:
            rows.extend(list(check()))
        except (UsageError, OSError) as error:
            rows.append(Row(name, "failed", _one_line(error)))
        except Exception as error:
            rows.append(Row(name, "failed", f"{type(error).__name__}: {_one_line(error)}"))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        return [Row(name, "failed", f"no answer in {seconds:g} s", "something hangs; look at this by hand")]
    return rows


def run_within(
    command: Sequence[str], seconds: float, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command and return what it said.

    One that a driver holds in the kernel can't be killed: it is left behind, where `subprocess.run` would
    wait for it. ``env`` is its environment, this process's by default.

    Raises
    ------
    subprocess.TimeoutExpired
        If it doesn't end in time, with what it had said.
    """
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", env=env
    )
    try:
        stdout, stderr = process.communicate(timeout=seconds)
    except BaseException:
        process.kill()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_SECONDS_TO_DIE)
        raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or repr(error)
