"""The page: figures and tables in one HTML file that loads nothing, complete or not there."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from megatron_periln.errors import ReportError
from megatron_periln.report.depth_figures import depth_figures
from megatron_periln.report.document import html_table, legend_entry, render_document, write_page
from megatron_periln.report.runs import ReportedRun, load_runs
from megatron_periln.report.tables import alert_table, flag_table, remarks, summary_table
from megatron_periln.report.training_figures import gradient_figure, loss_figure, throughput_figure

__all__ = ["render_page", "write_report"]

_NOTE = """
<p class="note">Final loss: mean of the last 1 % of the iterations, of ten at least. \
Variance of the residual stream after the last layer monitored: at its first and its last record. \
Tokens/s: median. The buttons above show and hide runs; drag in a figure to zoom, \
double-click to go back.</p>"""


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
    if output.is_dir():  # before anything is read
        raise ReportError(f"--output {output}: is a folder; give a file such as {output / 'report.html'}")
    if any(output.resolve() == path.resolve() for path in paths):
        raise ReportError(f"--output {output}: is one of the runs")
    runs = load_runs(paths)
    page = render_page(runs, title or ", ".join(run.name for run in runs))
    write_page(page, output, "--output")
    size = output.stat().st_size / 1e6
    return f"{output}: {len(runs)} run{'s' if len(runs) > 1 else ''}, {size:.1f} MB"


def render_page(runs: Sequence[ReportedRun], title: str) -> str:
    """Return the report of ``runs`` as HTML."""
    figures = [loss_figure(runs), gradient_figure(runs), *depth_figures(runs), throughput_figure(runs)]
    return render_document(
        title,
        [legend_entry(index, run.name, run.color, run.dash) for index, run in enumerate(runs)],
        html_table(summary_table(runs), [run.color for run in runs]) + _NOTE,
        figures,
        _details(runs),
    )


def _details(runs: Sequence[ReportedRun]) -> list[str]:
    parts = []
    if flags := flag_table(runs):
        parts.append(f'<section id="flags"><h2>Flags that differ</h2>{html_table(flags)}</section>')
    elif len(runs) > 1:
        parts.append('<section id="flags"><h2>Flags that differ</h2><p>None.</p></section>')
    if alerts := alert_table(runs):
        parts.append(f'<section id="alerts"><h2>Alerts</h2>{html_table(alerts)}</section>')
    else:
        parts.append('<section id="alerts"><h2>Alerts</h2><p>None.</p></section>')
    if told := remarks(runs):
        items = "".join(f"<li>{escape(remark)}</li>" for remark in told)
        parts.append(f'<section id="remarks"><h2>Remarks</h2><ul>{items}</ul></section>')
    return parts
