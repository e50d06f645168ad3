"""A plan on one HTML page, in the style of the report: memory by kind of rank, and what is sent."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from megatron_periln.plan.answer.planned import Planned
from megatron_periln.plan.answer.screen import comparison_rows, parts_of, verdict
from megatron_periln.plan.answer.units import gib
from megatron_periln.plan.machine.gpus import ALLOWANCES, GIB
from megatron_periln.report.colors import PART_COLORS
from megatron_periln.report.document import html_table, legend_entry, render_document, write_page
from megatron_periln.report.figures import Figure, Panel
from megatron_periln.report.tables import Table

__all__ = ["render_plan", "write_plan"]


def write_plan(planned: Sequence[Planned], output: Path) -> None:
    """Write the page of one plan, or of several that are compared.

    Raises
    ------
    ReportError
        If it cannot be written.
    """
    write_page(render_plan(planned), output, "--page")


def render_plan(planned: Sequence[Planned]) -> str:
    """Return the page."""
    names = list(dict.fromkeys(name for each in planned for name in parts_of(each)))
    colors = dict(zip(names, [*PART_COLORS, *PART_COLORS], strict=False))
    first = planned[0]
    title = (
        f"{first.args.world_size:,} x {first.machine.gpu.name}: {', '.join(each.label for each in planned)}"
    )
    head, *rows = comparison_rows(planned)
    summary = html_table(Table(head=["Run", *head[1:]], rows=rows))
    verdicts = "".join(f"<p>{escape(f'{each.label}: {verdict(each)}')}</p>" for each in planned)
    return render_document(
        title,
        [legend_entry(index, name, color) for index, (name, color) in enumerate(colors.items())],
        summary + verdicts,
        [_memory_figure(planned, colors), _traffic_figure(planned)],
        [*(_details(each) for each in planned), _allowances()],
    )


def _memory_figure(planned: Sequence[Planned], colors: dict[str, str]) -> Figure:
    widest = max(max(each.machine.gpu.memory, each.fullest.bytes) for each in planned) / GIB
    return Figure(
        name="memory",
        title="Memory",
        how_to_read="What each kind of rank needs at the peak of a step; dashed: what its GPU has.",
        panels=[_memory_panel(each, colors, widest) for each in planned],
    )


def _memory_panel(planned: Planned, colors: dict[str, str], widest: float) -> Panel:
    ranks = [f"{need.rank.name} ({need.rank.ranks_alike:,})" for need in planned.needs]
    traces: list[dict[str, Any]] = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "y": ranks,
            "x": [round(need.memory.get(name, 0) / GIB, 3) for need in planned.needs],
            "marker": {"color": f"@{color}"},
            "meta": {"run": index},
            "hovertemplate": f"{escape(name)}: %{{x:.2f}} GiB<extra>%{{y}}</extra>",
        }
        for index, (name, color) in enumerate(colors.items())
    ]
    memory = planned.machine.gpu.memory / GIB
    limit = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": [memory] * len(ranks),
        "y": ranks,
        "line": {"color": "@limit", "width": 2, "dash": "dash"},
        "marker": {"color": "@limit", "symbol": "line-ns-open", "size": 28},
        "hovertemplate": f"{planned.machine.gpu.name}: {memory:.1f} GiB<extra></extra>",
    }
    return Panel(
        title=planned.label,
        traces=[*traces, limit],
        layout={
            "barmode": "stack",
            "bargap": 0.25,
            "xaxis": {"title": {"text": "GiB"}, "range": [0, 1.04 * widest]},
            "yaxis": {"autorange": "reversed", "type": "category"},
        },
    )


def _traffic_figure(planned: Sequence[Planned]) -> Figure:
    return Figure(
        name="traffic",
        title="Sent in a step",
        how_to_read="What the busiest rank sends in each group: blue within its node, brown to others.",
        panels=[_traffic_panel(each) for each in planned],
    )


def _traffic_panel(planned: Planned) -> Panel:
    need = max(planned.needs, key=lambda need: sum(each.bytes for each in need.traffic))
    groups = [f"{each.group.kind} ({len(each.group.ranks):,})" for each in need.traffic]
    parts = {
        "within the node": ("part-1", [each.bytes - each.over_network for each in need.traffic]),
        "leaves the node": ("part-4", [each.over_network for each in need.traffic]),
    }
    traces: list[dict[str, Any]] = [
        {
            "type": "bar",
            "name": name,
            "x": groups,
            "y": [count / 1e9 for count in counts],
            "marker": {"color": f"@{color}"},
            "hovertemplate": f"{name}: %{{y:.3g}} GB<extra>%{{x}}</extra>",
        }
        for name, (color, counts) in parts.items()
    ]
    layout = {"barmode": "stack", "xaxis": {"type": "category"}, "yaxis": {"title": {"text": "GB"}}}
    return Panel(title=planned.label, traces=traces, layout=layout)


def _details(planned: Planned) -> str:
    names = parts_of(planned)
    table = Table(
        head=["GiB", *names, "all", "microbatches in flight"],
        rows=[
            [
                f"{need.rank.name}, {need.rank.ranks_alike:,} ranks",
                *(gib(need.memory.get(name, 0)) for name in names),
                gib(need.bytes),
                " + ".join(map(str, need.rank.microbatches_in_flight)),
            ]
            for need in planned.needs
        ],
    )
    return f"<section><h2>Memory of {escape(planned.label)}</h2>{html_table(table)}</section>"


def _allowances() -> str:
    items = "".join(f"<li>{escape(f'{each.name}: {each.source}')}</li>" for each in ALLOWANCES)
    return f"<section><h2>Allowances</h2><ul>{items}</ul></section>"
