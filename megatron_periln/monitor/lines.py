"""The lines of a monitor's file: each is whole, or it is the torn last one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from megatron_periln.monitor.schema import KINDS, SCHEMA_VERSION, RecordError

__all__ = ["read_lines"]


def read_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield each line of the file, without its newline, and the object that it holds.

    A last line that is no object was torn by a kill, and left out.

    Raises
    ------
    RecordError
        If the file cannot be read, is no monitor's file, is of a newer schema, or has a corrupt line
        that is not the last.
    """
    torn: str | None = None
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if torn is not None:
                    raise RecordError(torn)
                line = line.rstrip(b"\r\n")
                entry = _parse(line)
                if entry is None:
                    torn = _corrupt(path, number)
                    continue
                if number == 1:
                    _check_first(path, entry)
                yield line, entry
    except OSError as error:
        raise RecordError(f"{path}: cannot be read: {error.strerror}") from error


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        entry = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(entry, dict) or entry.get("kind") not in KINDS:
        return None
    return entry if type(entry.get("iteration")) is int else None


def _corrupt(path: Path, number: int) -> str:
    if number == 1:
        return f"{path}: not a monitor's file: its first line is no object with a kind and an iteration"
    return (
        f"{path}, line {number}: corrupt, with whole lines after it; a kill tears the last line only. "
        "Restore the file, or delete that line"
    )


def _check_first(path: Path, entry: dict[str, Any]) -> None:
    schema = entry.get("schema")
    if entry["kind"] != "run" or type(schema) is not int:
        raise RecordError(f"{path}: not a monitor's file: its first line is not of kind run, with a schema")
    if schema > SCHEMA_VERSION:
        raise RecordError(
            f"{path}: written with schema {schema}, this version reads up to {SCHEMA_VERSION}: update it"
        )
