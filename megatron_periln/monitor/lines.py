"""The lines of a monitor's file: JSON objects, whose ``kind`` says what they are.

Each is whole, or it is the torn last one. ``docs/monitor.md`` describes them for readers in other languages.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

import orjson

from megatron_periln.errors import UsageError

__all__ = [
    "FILE_NAME",
    "HEADER",
    "KINDS",
    "SCHEMA_VERSION",
    "STEP",
    "RecordError",
    "from_json",
    "read_blocks",
    "read_lines",
    "to_json",
]

SCHEMA_VERSION = 1
FILE_NAME = "monitor.jsonl"

KINDS = ("run", "step", "layers", "alert")

HEADER = ("version", "name", "placement", "num_layers", "hidden_size", "parameters", "flags", "started")
"""What a line of kind ``run`` says of its run."""

STEP = ("loss", "grad_norm", "learning_rate", "tokens", "seconds")
"""What a line of kind ``step`` says of its iteration."""


_BLOCK_BYTES = 1 << 16


class RecordError(UsageError):
    """A monitor's file that cannot be read, or does not fit the run."""


def to_json(value: Any) -> Any:
    """Return ``value`` for JSON: NaN and infinities become "nan", "inf" and "-inf", strange objects text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if hasattr(value, "__index__"):  # an integer of numpy's
        return int(value)
    if hasattr(value, "__float__"):
        return to_json(float(value))
    return str(value)


def from_json(value: float | str | None) -> float:
    """Return the number that `to_json` wrote; what was None is NaN.

    Raises
    ------
    ValueError
        If it is no number.
    """
    return math.nan if value is None else float(value)


def read_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield each line of the file, without its newline, and the object that it holds.

    A last line that is no object was torn by a kill, and is skipped.

    Raises
    ------
    RecordError
        If the file cannot be read, is no monitor's file, is of a newer schema, or has a corrupt line
        that is not the last.
    """
    for lines, entries in read_blocks(path):
        yield from zip((line.rstrip(b"\r\n") for line in lines), entries, strict=True)


def read_blocks(path: Path) -> Iterator[tuple[list[bytes], list[dict[str, Any]]]]:
    """Yield the same, some lines at a time, which takes half the time; each line with its newline."""
    torn: str | None = None
    number = 1
    try:
        with path.open("rb") as file:
            while lines := file.readlines(_BLOCK_BYTES):
                if torn is None:
                    whole, entries = _parse_block(lines)
                    if number == 1 and entries:
                        _check_first(path, entries[0])
                    if entries:
                        yield lines[:whole], entries
                    torn = _corrupt(path, number + whole) if whole < len(lines) else None
                    if whole >= len(lines) - 1:
                        number += len(lines)
                        continue
                raise RecordError(torn)
    except OSError as error:
        raise RecordError(f"{path}: cannot be read: {error.strerror}") from error


def _parse_block(lines: list[bytes]) -> tuple[int, list[dict[str, Any]]]:
    """Return the objects of the lines before the first that is none, and how many they are."""
    try:
        # Newlines between and in them stay, so that no two halves make a whole.
        entries = orjson.loads(b"[%s]" % b",".join(lines))
    except orjson.JSONDecodeError:
        entries = []
    if len(entries) == len(lines) and _are_entries(entries):
        return len(lines), entries
    entries = list(takewhile(lambda entry: entry is not None, map(_parse, lines)))
    return len(entries), entries


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        entry = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return entry if _is_entry(entry) else None


def _are_entries(block: list[Any]) -> bool:
    """Return whether `_is_entry` of all, at a third of the time."""
    try:
        kinds, iterations = {entry["kind"] for entry in block}, {type(entry["iteration"]) for entry in block}
    except (KeyError, TypeError, IndexError):
        return False
    return set(map(type, block)) == {dict} and kinds <= set(KINDS) and iterations == {int}


def _is_entry(entry: Any) -> bool:
    return type(entry) is dict and entry.get("kind") in KINDS and type(entry.get("iteration")) is int


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
