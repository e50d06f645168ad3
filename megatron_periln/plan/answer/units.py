"""Numbers as a reader takes them in."""

from __future__ import annotations

from megatron_periln.plan.machine.gpus import GIB

__all__ = ["bar", "columns", "gib", "seconds", "short", "traffic_bytes"]


def gib(count: float) -> str:
    """Return bytes in GiB, as GPUs' memory is told."""
    return f"{count / GIB:.1f}"


def traffic_bytes(count: float) -> str:
    """Return bytes in powers of 1000, as links' bandwidths are told."""
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"


def short(number: float) -> str:
    """Return a number with three digits and a unit."""
    for factor, unit in ((1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= factor:
            return f"{number / factor:.3g}{unit}"
    return f"{number:.3g}"


def seconds(count: float) -> str:
    """Return seconds in a unit that fits."""
    for factor, unit in ((86400, "days"), (3600, "h"), (60, "min"), (1, "s")):
        if count >= 2 * factor or (unit == "s" and count >= 1):
            return f"{count / factor:.3g} {unit}"
    return f"{count * 1e3:.3g} ms"


def bar(parts: list[tuple[str, int]], whole: int, width: int, full: int) -> str:
    """Return a bar of symbols, with a | where ``whole`` ends.

    Parameters
    ----------
    parts
        A symbol, and the bytes that it stands for.
    whole
        Bytes of the GPU.
    width
        Columns of the longest bar.
    full
        Bytes of the longest bar: the GPU's, or more.
    """
    line, used = "", 0
    for symbol, count in parts:
        used += count
        line += symbol * (round(used / full * width) - len(line))
    end = round(whole / full * width)
    line = line.ljust(end, "·")
    return f"{line[:end]}|{line[end:]}"


def columns(rows: list[list[str]], *, left: int = 1) -> list[str]:
    """Return rows with aligned cells: the first ``left`` columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if number < left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
