"""The rows of the table."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

__all__ = ["Row", "as_json", "as_lines", "as_table", "fit"]

_WIDTH = 90


@dataclass(frozen=True)
class Row:
    """What a check found.

    Parameters
    ----------
    check
        What was looked at.
    status
        ``"failed"`` makes the node unfit.
    value
        What was measured.
    advice
        What to do about it.
    node
        The node it was found on.
    """

    check: str
    status: Literal["ok", "warning", "failed"]
    value: str
    advice: str = ""
    node: str = ""


def fit(rows: Iterable[Row]) -> bool:
    """Tell whether nothing failed."""
    return all(row.status != "failed" for row in rows)


def as_table(rows: Sequence[Row]) -> str:
    """Return a table, in which what several nodes have in common stands once."""
    cells = [("check", "node", "status", "value")]
    nodes = {row.node for row in rows}
    merged: dict[Row, list[str]] = {}
    for row in rows:
        merged.setdefault(replace(row, node=""), []).append(row.node)
    for row, on in merged.items():
        where = f"all {len(on)}" if len(on) == len(nodes) > 1 else ",".join(sorted(set(on)))
        cells.append((row.check, where, row.status, textwrap.shorten(row.value, _WIDTH, placeholder=" ...")))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def as_lines(rows: Iterable[Row]) -> list[str]:
    """Return one line for each cause of trouble: where, what, and what to do."""
    kinds = {"failed": "error", "warning": "warning"}
    return [
        f"{kinds[row.status]}: {row.node}: {row.check}: {row.value}"
        + (f"; {row.advice}" if row.advice else "")
        for row in rows
        if row.status in kinds
    ]


def as_json(rows: Sequence[Row]) -> str:
    """Return the rows as JSON."""
    return json.dumps({"fit": fit(rows), "rows": [asdict(row) for row in rows]}, indent=2)
