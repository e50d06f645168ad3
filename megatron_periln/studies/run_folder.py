"""What is known of a run in its folder: ``cell.json``."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_periln.errors import UsageError
from megatron_periln.files import try_lock, write_text
from megatron_periln.monitor.lines import FILE_NAME
from megatron_periln.monitor.reading import Run, read_run
from megatron_periln.studies.data_files import changed_since, data_files
from megatron_periln.studies.measures import broken_off, measure
from megatron_periln.studies.study import StudyRun

__all__ = ["DONE", "RunFolder"]

DONE = ("finished", "diverged")


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, and what became of it.

    The status is ``pending``, ``running`` (or cut off while it was), ``finished``, ``diverged`` or
    ``failed``; only finished and diverged runs are not run again.
    """

    path: Path
    run: StudyRun

    def read(self) -> dict[str, Any]:
        """Return what ``cell.json`` says, or that the run is pending.

        Raises
        ------
        UsageError
            If it can't be read, or if the folder is that of a run with other flags.
        """
        file = self.path / "cell.json"
        try:
            state: dict[str, Any] = json.loads(file.read_text())
        except FileNotFoundError:
            return {"status": "pending"}
        except (OSError, ValueError) as error:
            raise UsageError(f"{file}: cannot be read ({error}); remove it to run this one again") from error
        if state.get("flags") != list(self.run.flags):
            raise UsageError(
                f"{self.path}: holds a run with other flags than the study has now; give another --output, "
                "or remove it"
            )
        return state

    def refuse_other_data(self, known: dict[str, dict[str, Any]] | None = None) -> None:
        """Refuse a run whose data or tokenizer have changed: what was trained is of those before.

        Parameters
        ----------
        known
            Of `data_files`.

        Raises
        ------
        UsageError
            Naming them.
        """
        before = self.read().get("data", {})
        if before and (changed := changed_since(before, data_files(self.run.flags, known))):
            raise UsageError(
                f"{self.path}: holds a run on what {', '.join(changed)} held then, and it has changed; give "
                "another --output, or remove that folder"
            )

    def lock(self) -> int | None:
        """Take the folder: return the descriptor that locks it while open, None if another process has it.

        On a file system without locks nobody has it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        if try_lock(lock) is False:
            os.close(lock)
            return None
        return lock

    def begin(self, about: dict[str, Any]) -> None:
        """Write that the run is running, and ``about`` it; the folder must be locked.

        What former attempts were made of, where that was something else, is kept as ``earlier``: a run
        that resumes is theirs, too.
        """
        state = self.read()
        earlier = state.get("earlier", [])
        before = {key: state.get(key) for key in about}
        if "attempts" in state and before not in (about, *earlier):
            earlier = [*earlier, before]
        self._write(
            {
                "status": "running",
                "flags": list(self.run.flags),
                "choices": self.run.choices,
                "seed": self.run.seed,
                "attempts": state.get("attempts", 0) + 1,
                "started": time.time(),
                "earlier": earlier,
                "data": data_files(self.run.flags),
                **about,
            }
        )

    def end(self, exit_code: int, diverged_above: float | None) -> str:
        """Write what became of the run, and return its status."""
        state = self.read()
        status, reason = self._outcome(exit_code, diverged_above)
        done = {"status": status, "reason": reason, "exit_code": exit_code, "ended": time.time()}
        self._write({**state, **done})
        return status

    def _outcome(self, exit_code: int, diverged_above: float | None) -> tuple[str, str | None]:
        try:
            record = self.read_record()
        except UsageError as error:
            return "failed", self._last_words() if exit_code else str(error)
        not_finite, early = broken_off(record)
        if not_finite is not None:
            return "diverged", not_finite
        if exit_code or early is not None:
            return "failed", self._last_words() if exit_code else early
        values = measure(record, self.log)
        loss = values["training_loss"] if values["validation_loss"] is None else values["validation_loss"]
        if loss is None or not math.isfinite(loss):
            return "diverged", "the loss at the end is not finite"
        if diverged_above is not None and loss > diverged_above:
            return "diverged", f"the loss at the end is {loss:.3f}, above {diverged_above}"
        return "finished", None

    def _last_words(self) -> str:
        """Return the line of the log that says why the run failed."""
        try:
            log = self.log.read_text(errors="replace")
        except OSError:
            log = ""
        lines = [line for line in log.splitlines() if line.strip()] or ["it left no log"]
        errors = [line for line in lines if line.startswith("error:")]
        return (errors or lines)[-1].removeprefix("error: ")

    def _write(self, state: dict[str, Any]) -> None:
        write_text(self.path / "cell.json", json.dumps(state, indent=1) + "\n")

    @property
    def log(self) -> Path:
        """What the run prints."""
        return self.path / "log.txt"

    @property
    def record(self) -> Path:
        """The monitor's file."""
        return self.path / FILE_NAME

    def read_record(self) -> Run:
        """Read the monitor's file.

        Raises
        ------
        UsageError
            If there is none, or a corrupt one.
        """
        return read_run(self.record)
