"""The page: figures and tables in one HTML file that loads nothing, complete or not there."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

import orjson

from megatron_periln.errors import ReportError
from megatron_periln.files import write_text
from megatron_periln.report.colors import PALETTES, css_variables
from megatron_periln.report.depth_figures import depth_figures
from megatron_periln.report.figures import Figure
from megatron_periln.report.runs import ReportedRun, load_runs
from megatron_periln.report.tables import Table, alert_table, flag_table, remarks, summary_table
from megatron_periln.report.training_figures import gradient_figure, loss_figure, throughput_figure
from megatron_periln.version import __version__

__all__ = ["render_page", "write_report"]


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


def render_page(runs: Sequence[ReportedRun], title: str) -> str:
    """Return the report of ``runs`` as HTML.

    Raises
    ------
    ReportError
        If Plotly is not installed.
    """
    figures = [loss_figure(runs), gradient_figure(runs), *depth_figures(runs), throughput_figure(runs)]
    data = {
        "palettes": PALETTES,
        "figures": {
            f"{figure.name}-{number}": {"data": panel.traces, "layout": panel.layout}
            for figure in figures
            for number, panel in enumerate(figure.panels)
        },
    }
    # U+2028 and the like are fine in JSON; only the end of the element must not appear.
    json = orjson.dumps(data).decode().replace("<", "\\u003c")
    return Template(_asset("template.html")).substitute(
        title=escape(title),
        style=Template(_asset("style.css")).substitute(
            light=css_variables("light"), dark=css_variables("dark")
        ),
        legend="\n".join(_legend(index, run) for index, run in enumerate(runs)),
        summary=_table(summary_table(runs), [run.color for run in runs]),
        figures="\n".join(_figure(figure) for figure in figures),
        details="\n".join(_details(runs)),
        made=f"megatron-periln {__version__}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        data=json,
        plotly=_plotly(),
        script=_asset("script.js"),
    )


def _asset(name: str) -> str:
    return resources.files("megatron_periln.report").joinpath("assets", name).read_text(encoding="utf-8")


def _plotly() -> str:
    try:
        return resources.files("plotly").joinpath("package_data", "plotly.min.js").read_text(encoding="utf-8")
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise ReportError("plotly is not installed: pip install 'megatron-periln[report]'") from error


def _legend(index: int, run: ReportedRun) -> str:
    return (
        f'<button type="button" class="run" data-run="{index}" aria-pressed="true">'
        f"{_chip(run.color, run.dash)}{escape(run.name)}</button>"
    )


def _chip(color: str, dash: str = "solid") -> str:
    pattern = {"solid": "", "dash": "6 4", "dot": "2 3", "dashdot": "6 3 2 3", "longdash": "10 4"}.get(
        dash, "10 3 2 3"
    )
    return (
        '<svg class="chip" viewBox="0 0 24 8" aria-hidden="true"><line x1="0" y1="4" x2="24" y2="4" '
        f'style="stroke:var(--{color})" stroke-width="4" stroke-dasharray="{pattern}"/></svg>'
    )


def _figure(figure: Figure) -> str:
    panels = "\n".join(
        f'<div class="panel">{f"<h3>{escape(panel.title)}</h3>" if panel.title else ""}'
        f'<div class="plot" id="{figure.name}-{number}" role="img" '
        f'aria-label="{escape(f"{figure.title} {panel.title}".strip())}"></div></div>'
        for number, panel in enumerate(figure.panels)
    )
    return (
        f'<section class="figure"><h2>{escape(figure.title)}</h2><p>{escape(figure.how_to_read)}</p>'
        f'<div class="panels of-{len(figure.panels)}">{panels}</div></section>'
    )


def _table(table: Table, colors: Sequence[str] = ()) -> str:
    """Return a table; on a narrow screen each row becomes a card, and cells carry their column's name."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.head)
    rows = []
    for number, row in enumerate(table.rows):
        name = escape(row[0])
        if colors:
            name = f'<span class="chipped">{_chip(colors[number])}{name}</span>'
        cells = "".join(
            f'<td data-label="{escape(column)}">{escape(cell)}</td>'
            for column, cell in zip(table.head[1:], row[1:], strict=True)
        )
        rows.append(f'<tr><th scope="row">{name}</th>{cells}</tr>')
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _details(runs: Sequence[ReportedRun]) -> list[str]:
    parts = []
    if flags := flag_table(runs):
        parts.append(f'<section id="flags"><h2>Flags that differ</h2>{_table(flags)}</section>')
    elif len(runs) > 1:
        parts.append('<section id="flags"><h2>Flags that differ</h2><p>None.</p></section>')
    if alerts := alert_table(runs):
        parts.append(f'<section id="alerts"><h2>Alerts</h2>{_table(alerts)}</section>')
    else:
        parts.append('<section id="alerts"><h2>Alerts</h2><p>None.</p></section>')
    if told := remarks(runs):
        items = "".join(f"<li>{escape(remark)}</li>" for remark in told)
        parts.append(f'<section id="remarks"><h2>Remarks</h2><ul>{items}</ul></section>')
    return parts
