"""A report on the disk: complete, or not there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_periln.errors import ReportError
from megatron_periln.files import write_text
from megatron_periln.report.page import render_page
from megatron_periln.report.runs import load_runs

__all__ = ["write_report"]


def write_report(paths: Sequence[Path], output: Path, title: str | None = None) -> str:
    """Write the report of the runs at ``paths`` to ``output``, and return one line about it.

    A report that is there is replaced once the new one is complete.

    Parameters
    ----------
    paths
        Monitor's files, or folders that hold one.
    output
        The page to write.
    title
        Its title; None takes the runs' names.

    Raises
    ------
    UsageError
        For a run that cannot be read, or an output that cannot be written; then nothing was.
    """
    if output.is_dir():
        raise ReportError(f"--output {output}: is a folder; give a file such as {output / 'report.html'}")
    if any(output.resolve() == path.resolve() for path in paths):
        raise ReportError(f"--output {output}: is one of the runs")
    runs = load_runs(paths)
    page = render_page(runs, title or ", ".join(run.name for run in runs))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, page)
    except OSError as error:
        raise ReportError(f"--output {output}: cannot be written: {error.strerror}") from error
    size = output.stat().st_size / 1e6
    return f"{output}: {len(runs)} run{'s' if len(runs) > 1 else ''}, {size:.1f} MB"
