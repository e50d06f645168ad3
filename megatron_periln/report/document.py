"""The frame of a page: a legend, tables and figures in one HTML file that loads nothing."""

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
from megatron_periln.report.figures import Figure
from megatron_periln.report.tables import Table
from megatron_periln.version import __version__

__all__ = ["html_table", "legend_entry", "render_document", "write_page"]


def render_document(
    title: str, legend: Sequence[str], summary: str, figures: Sequence[Figure], details: Sequence[str]
) -> str:
    """Return a page as HTML.

    Parameters
    ----------
    title
        Its title, as text.
    legend
        Those of `legend_entry`.
    summary, details
        HTML before and after the figures.
    figures
        What is drawn.
    """
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
        legend="\n".join(legend),
        summary=summary,
        figures="\n".join(_figure(figure) for figure in figures),
        details="\n".join(details),
        made=f"megatron-periln {__version__}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        data=json,
        plotly=_asset("plotly-basic.min.js"),
        script=_asset("script.js"),
    )


def write_page(page: str, output: Path, flag: str) -> None:
    """Write a page, or replace the one that is there once it is complete.

    Raises
    ------
    ReportError
        If ``output``, which ``flag`` names, cannot be written.
    """
    if output.is_dir():
        raise ReportError(f"{flag} {output}: is a folder; give a file such as {output / 'report.html'}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, page)
    except OSError as error:
        raise ReportError(f"{flag} {output}: cannot be written: {error.strerror}") from error


def _asset(name: str) -> str:
    return resources.files("megatron_periln.report").joinpath("assets", name).read_text(encoding="utf-8")


def legend_entry(index: int, name: str, color: str, dash: str = "solid") -> str:
    """Return a button that shows and hides the traces whose ``meta`` has the run ``index``."""
    return (
        f'<button type="button" class="run" data-run="{index}" aria-pressed="true">'
        f"{_chip(color, dash)}{escape(name)}</button>"
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


def html_table(table: Table, colors: Sequence[str] = ()) -> str:
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
