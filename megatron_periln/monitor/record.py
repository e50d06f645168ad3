"""The file that a monitored run writes: whole after a kill, without duplicates after a resume."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

from megatron_periln.files import replacing
from megatron_periln.monitor.lines import HEADER, SCHEMA_VERSION, RecordError, read_lines, to_json
from megatron_periln.monitor.statistics import STATISTICS

__all__ = ["RunRecord"]

logger = logging.getLogger(__name__)

_SAME_MODEL = ("placement", "num_layers", "hidden_size")


class RunRecord:
    """Appends to the file of a run; made by `open`.

    Each line reaches the operating system in one write, before the call returns: a kill of the process
    loses at most the line being written, which `open` repairs. `sync` brings lines to the disk; call it
    before a checkpoint is saved, so that a crash of the machine costs no line that the checkpoint
    presupposes. A disk that is full does not end the training: a warning is logged once, and the file
    says how many lines it lacks.
    """

    def __init__(self, path: Path, descriptor: int, last_iteration: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self._last = {"step": last_iteration, "layers": last_iteration}
        self._lost = 0

    @classmethod
    def open(cls, path: Path, header: Mapping[str, Any], resume_from: int) -> RunRecord:
        """Open the file of a run that starts, or that resumes from a checkpoint.

        The file is written anew under a temporary name and renamed, so a former process of the run that
        still writes, writes to no file that anyone reads.

        Parameters
        ----------
        path
            The file; its folder is made.
        header
            The fields `HEADER` of the run.
        resume_from
            The checkpoint's iteration. What the file holds after it is dropped: those iterations come
            again. With 0 the run is a new one, and a file with iterations of an earlier one is kept as
            ``NAME.1.jsonl``, or the first free number.

        Raises
        ------
        RecordError
            If the file is corrupt, of another model, or cannot be written.
        """
        if missing := [field for field in HEADER if field not in header]:
            raise ValueError(f"the header lacks {', '.join(missing)}")
        start = {"kind": "run", "schema": SCHEMA_VERSION, "iteration": resume_from}
        line = _dump({**start, **header, **start})
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as (temporary,):
                with temporary.open("wb") as file:
                    _write_start(file.fileno(), path, header, resume_from, line)
                if resume_from == 0:
                    _keep_earlier_run(path)
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            return cls(path, descriptor, resume_from or -1)
        except OSError as error:
            raise RecordError(f"{path}: cannot be written: {error.strerror}") from error

    def step(
        self,
        iteration: int,
        *,
        loss: float | None,
        grad_norm: float | None,
        learning_rate: float | None,
        tokens: int | None,
        seconds: float | None,
    ) -> None:
        """Write what every iteration has; ``tokens`` and ``seconds`` are of this iteration alone."""
        self._advance("step", iteration)
        self._write(
            {
                "kind": "step",
                "iteration": iteration,
                "loss": loss,
                "grad_norm": grad_norm,
                "learning_rate": learning_rate,
                "tokens": tokens,
                "seconds": seconds,
            }
        )

    def layers(self, iteration: int, layers: list[int], statistics: Mapping[str, list[float | None]]) -> None:
        """Write an interval's statistics, each a list parallel to ``layers``, with nine digits.

        Raises
        ------
        ValueError
            For a statistic that there is not, a list of another length, or an iteration again.
        """
        for name, values in statistics.items():
            if name not in STATISTICS:
                raise ValueError(f"unknown statistic {name}")
            if len(values) != len(layers):
                raise ValueError(f"{name} has {len(values)} values for {len(layers)} layers")
        self._advance("layers", iteration)
        rounded = {
            name: [None if value is None else float(f"{value:.9g}") for value in values]
            for name, values in statistics.items()
        }
        self._write({"kind": "layers", "iteration": iteration, "layers": layers, **rounded})

    def alert(
        self,
        iteration: int,
        kind: str,
        message: str,
        layer: int | None = None,
        value: float | None = None,
    ) -> None:
        """Write an alert; ``kind`` is one of `megatron_periln.monitor.alerts.ALERTS`."""
        self._write(
            {
                "kind": "alert",
                "iteration": iteration,
                "alert": kind,
                "message": message,
                "layer": layer,
                "value": value,
            }
        )

    def sync(self) -> None:
        """Bring all lines to the disk."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            logger.warning("%s: cannot be brought to the disk: %s", self.path, error.strerror)

    def close(self) -> None:
        """Bring all lines to the disk and close the file; once is enough, twice does no harm."""
        if self._descriptor >= 0:
            self.sync()
            os.close(self._descriptor)
            self._descriptor = -1

    def _advance(self, kind: str, iteration: int) -> None:
        if iteration <= self._last[kind]:
            raise ValueError(f"{kind} of iteration {iteration} after that of {self._last[kind]}")
        self._last[kind] = iteration

    def _write(self, entry: dict[str, Any]) -> None:
        line = _dump(entry)
        if self._lost:
            message = f"the {self._lost} lines before this one could not be written"
            about = {"kind": "alert", "iteration": entry["iteration"], "alert": "record", "message": message}
            line = _dump({**about, "layer": None, "value": self._lost}) + line
        try:
            size = os.fstat(self._descriptor).st_size
            if os.write(self._descriptor, line) != len(line):
                os.ftruncate(self._descriptor, size)
                raise OSError(0, "the disk is full")
            self._lost = 0
        except OSError as error:
            if not self._lost:
                logger.warning("%s: cannot be written: %s; training goes on", self.path, error.strerror)
            self._lost += 1


def _dump(entry: Mapping[str, Any]) -> bytes:
    return orjson.dumps(to_json(entry), option=orjson.OPT_APPEND_NEWLINE)


def _write_start(
    descriptor: int, path: Path, header: Mapping[str, Any], resume_from: int, line: bytes
) -> None:
    """Write what the file keeps of earlier processes, and the line that begins this one."""
    with os.fdopen(descriptor, "wb", closefd=False) as file:
        if resume_from > 0 and path.exists():
            for index, (kept, entry) in enumerate(read_lines(path)):
                if index == 0:
                    _check_model(path, entry, header)
                elif entry["iteration"] > resume_from or (
                    entry["kind"] == "run" and entry["iteration"] == resume_from
                ):
                    continue
                file.write(kept + b"\n")
        file.write(line)


def _check_model(path: Path, entry: Mapping[str, Any], header: Mapping[str, Any]) -> None:
    for field in _SAME_MODEL:
        if entry.get(field) != to_json(header[field]):
            raise RecordError(
                f"{path}: holds another run, with {field} {entry.get(field)} where this one has "
                f"{header[field]}; choose another --monitor-file"
            )


def _keep_earlier_run(path: Path) -> None:
    """Give an earlier run's file a name of its own, beside the one it has."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with suppress(RecordError):
        if all(entry["kind"] == "run" for _, entry in read_lines(path)):
            return
    number = 1
    while True:
        earlier = path.with_name(f"{path.stem}.{number}{path.suffix}")
        try:
            os.link(path, earlier)
        except FileExistsError:
            number += 1
        except OSError:  # a file system without hard links
            path.rename(earlier)
            break
        else:
            break
    logger.warning("%s held an earlier run: kept as %s", path, earlier)
