"""One restart attempt of a run writes to a checkpoint folder: the newest that trains.

After a pulled cable, SLURM requeues a job whose old ranks live on: two runs save to one folder. The
folder holds ``incarnation-N.json``, which names the restart attempt that took it; a new one takes N + 1.
Who sees a higher number than its own has been superseded, and writes nothing more. A job that lost its folder
to another job has lost it for all its restarts: two that are requeued would take it from each other in turn.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_periln.checkpoints.restart_attempt import RestartAttempt
from megatron_periln.errors import UsageError
from megatron_periln.files import sync

__all__ = ["Fence", "SupersededError"]

_TICKET = re.compile(r"incarnation-(\d{7,})\.json")
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class SupersededError(UsageError):
    """A newer restart attempt has taken the folder."""


@dataclass(frozen=True)
class _Ticket:
    token: int
    holder: RestartAttempt
    superseded: tuple[str, ...]
    superseded_jobs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fence:
    """A checkpoint folder, taken by a restart attempt.

    Attributes
    ----------
    folder
        What ``--save`` names.
    token
        Higher than that of every restart attempt before.
    holder
        The restart attempt that took it.
    """

    folder: Path
    token: int
    holder: RestartAttempt

    @classmethod
    def take(cls, folder: Path, attempt: RestartAttempt) -> Fence:
        """Take a folder from whoever holds it.

        Parameters
        ----------
        folder
            An existing folder.
        attempt
            Takes it, and after it every other job or later restart.

        Raises
        ------
        SupersededError
            If the attempt, or its job, lost this folder before, or the job has been requeued since.
        UsageError
            If a run that is no job of a scheduler's holds it, and runs on this machine; or if the folder
            can't be written.
        """
        try:
            while True:
                current = _current(folder)
                if current is not None:
                    _check_successor(folder, current, attempt)
                token = _take_next(folder, current, attempt)
                if token is not None:
                    return cls(folder, token, attempt)
        except OSError as error:
            raise UsageError(
                f"--save {folder}: cannot be written: {error.strerror or error}; "
                "give a folder that can, with room on its disk"
            ) from error

    @classmethod
    def check_free(cls, folder: Path, attempt: RestartAttempt) -> None:
        """Check that an attempt may take a folder, and leave it to whoever holds it.

        Raises
        ------
        UsageError
            As `take` does.
        """
        with _reading(folder):
            current = _current(folder)
        if current is not None:
            _check_successor(folder, current, attempt)

    def check(self) -> None:
        """Check that no newer restart attempt has taken the folder.

        Raises
        ------
        SupersededError
            Naming it.
        UsageError
            If the folder can't be read, or the ticket in it was removed.
        """
        with _reading(self.folder):
            tickets = _tickets(self.folder)
            if max(tickets, default=0) > self.token:
                newer = _current(self.folder)
                assert newer is not None
                raise _superseded(self.folder, newer, self.holder)
        if self.token not in tickets:
            raise UsageError(
                f"--save {self.folder}: {_path(self.folder, self.token).name} is gone, so another run may "
                "write there; leave that file where it is, and start this run again"
            )


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"--save {folder}: cannot be read: {error.strerror or error}") from error


def _check_successor(folder: Path, current: _Ticket, attempt: RestartAttempt) -> None:
    """Refuse ``attempt`` if it is not newer than the one that holds the folder."""
    lost = attempt.name in current.superseded or attempt.job in current.superseded_jobs
    if lost or attempt.is_older_than(current.holder):
        raise _superseded(folder, current, attempt)
    alone = not current.holder.job and current.holder.name != attempt.name
    if alone and not attempt.job and current.holder.is_running_here():
        raise UsageError(
            f"--save {folder}: run {current.holder} writes there; stop it, or give another --save"
        )


def _take_next(folder: Path, current: _Ticket | None, attempt: RestartAttempt) -> int | None:
    """Write the ticket after ``current``; None if another took it, or went past it, in this moment."""
    token = 1 if current is None else current.token + 1
    names, jobs = [], []
    if current is not None:
        names = [*current.superseded, current.holder.name]
        jobs = [*current.superseded_jobs, current.holder.job]
    superseded = tuple(dict.fromkeys(name for name in names if name != attempt.name))
    superseded_jobs = tuple(dict.fromkeys(job for job in jobs if job not in ("", attempt.job)))
    try:
        _write(folder, _Ticket(token, attempt, superseded, superseded_jobs))
    except FileExistsError:
        return None
    tickets = _tickets(folder)
    if max(tickets, default=0) != token:
        _path(folder, token).unlink(missing_ok=True)
        return None
    for older in tickets - {token}:
        _path(folder, older).unlink(missing_ok=True)
    return token


def _superseded(folder: Path, newer: _Ticket, older: RestartAttempt) -> SupersededError:
    return SupersededError(
        f"--save {folder} was taken over by a newer run: {newer.holder}; "
        f"this one, {older}, stops without writing there"
    )


def _tickets(folder: Path) -> set[int]:
    return {int(match[1]) for name in os.listdir(folder) if (match := _TICKET.fullmatch(name))}  # noqa: PTH208


def _path(folder: Path, token: int) -> Path:
    return folder / f"incarnation-{token:07d}.json"


def _current(folder: Path) -> _Ticket | None:
    """Return the highest ticket; one that is removed meanwhile has a successor."""
    while tickets := _tickets(folder):
        token = max(tickets)
        try:
            entries = json.loads(_path(folder, token).read_text())
            return _Ticket(
                token,
                RestartAttempt.from_json(entries["holder"]),
                tuple(entries["superseded"]),
                tuple(entries.get("superseded_jobs", ())),
            )
        except FileNotFoundError:
            continue
        except (ValueError, KeyError, TypeError):  # cut off: whoever took it is unknown
            return _Ticket(
                token, RestartAttempt("unknown", host="an unknown host", process="", started="?"), ()
            )
    return None


def _write(folder: Path, ticket: _Ticket) -> None:
    """Write a ticket, whole, unless its number is taken.

    Raises
    ------
    FileExistsError
        If it is.
    """
    path = _path(folder, ticket.token)
    entries = {
        "holder": ticket.holder.to_json(),
        "superseded": ticket.superseded,
        "superseded_jobs": ticket.superseded_jobs,
    }
    text = json.dumps(entries, indent=1) + "\n"
    temporary = path.with_name(f"{path.name}.{ticket.holder.host}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text)
        sync(temporary)
        try:
            os.link(temporary, path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            with path.open("x") as stream:  # a file system without hard links
                stream.write(text)
            sync(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(folder)
