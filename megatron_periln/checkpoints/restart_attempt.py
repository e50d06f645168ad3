"""Which start of which job this process is part of."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

__all__ = ["RestartAttempt"]


@dataclass(frozen=True)
class RestartAttempt:
    """One start of a job.

    Attributes
    ----------
    name
        Of the attempt: the same for all its processes, and for those that torchrun restarts.
    job
        What it is a start of, "" if unknown.
    restart
        How often the job was requeued before.
    host, process
        Where its rank 0 runs. ``process`` names a process of this machine's current boot and process
        namespace, and is "" where that can't be told.
    started
        When, in UTC, for people.
    """

    name: str
    job: str = ""
    restart: int = 0
    host: str = field(default_factory=socket.gethostname)
    process: str = field(default_factory=lambda: _process(os.getpid()))
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(" ", "seconds"))

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> RestartAttempt:
        """Return this process's restart attempt.

        ``MEGATRON_PERILN_INCARNATION`` names it, or else ``SLURM_JOB_ID`` and
        ``SLURM_RESTART_COUNT``; without either, every start is one of its own.
        """
        if name := environment.get("MEGATRON_PERILN_INCARNATION"):
            return cls(name)
        if job := environment.get("SLURM_JOB_ID"):
            count = environment.get("SLURM_RESTART_COUNT", "")
            restart = int(count) if count.isdecimal() else 0
            return cls(f"job {job}, restart {restart}", job, restart)
        return cls(uuid.uuid4().hex[:12])

    @classmethod
    def from_json(cls, entries: Mapping[str, Any]) -> RestartAttempt:
        """Return the attempt that `to_json` wrote."""
        return cls(**{name: entries[name] for name in cls.__dataclass_fields__})

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        return asdict(self)

    def is_older_than(self, other: RestartAttempt) -> bool:
        """Tell whether the same job was requeued after this start of it."""
        return bool(self.job) and self.job == other.job and self.restart < other.restart

    def is_running_here(self) -> bool:
        """Tell whether its rank 0 is known to run on this machine."""
        pid = self.process.split(" ")[0]
        return bool(pid) and self.host == socket.gethostname() and self.process == _process(int(pid))

    def __str__(self) -> str:
        pid = self.process.split(" ")[0]
        process = f", process {pid}" if pid else ""
        return f"{self.name} (on {self.host}{process}, since {self.started})"


def _process(pid: int) -> str:
    """Return "pid, its start, the boot, the process namespace" of a running process, "" if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")  # noqa: PTH115
    except OSError:
        return ""
    return "" if stat[0] in "ZX" else f"{pid} {stat[19]} {boot} {namespace}"
