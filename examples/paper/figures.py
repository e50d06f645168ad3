"""Draw the figures of docs/reproduction.md from the results of the studies."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from svg import Line, Panel, draw

from megatron_periln.files import write_text
from megatron_periln.report.colors import PLACEMENT_COLORS

ROOT = Path(__file__).resolve().parents[2]
NAMES = {"peri": "Peri-LN", "pre": "Pre-LN", "post": "Post-LN", "output": "Output-only"}
FP16_LARGEST = 65504.0
RATE = "1.6e-2"  # of the ablations
Results = dict[str, Any]


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser that knows where results are: committed ones, or those of studies that ran here."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument(
        "--results",
        type=Path,
        default=ROOT / "examples/paper/results",
        help="folder with STUDY.json or STUDY/results.json; default: the committed results",
    )
    return parser


def reader(folder: Path) -> Callable[[str], Results]:
    """Return what reads a study's results from a folder."""

    def read(study: str) -> Results:
        committed, made_here = folder / f"{study}.json", folder / study / "results.json"
        path = committed if committed.exists() else made_here
        return dict(json.loads(path.read_text()))

    return read


def color(placement: str) -> str:
    """Return a placement's colour on white."""
    return PLACEMENT_COLORS[placement][0]


def over_rates(results: Results, measure: str, **panel: Any) -> Panel:
    """Draw a measure over the learning rate: means and deviations of finished runs, crosses for others."""
    lines = []
    for placement, name in NAMES.items():
        rows = [row for row in results["summary"] if row["choices"]["norm-placement"] == placement]
        rows.sort(key=lambda row: float(row["choices"]["lr"]))
        known = [row for row in rows if row["measures"][measure]["mean"] is not None]
        points = [(float(row["choices"]["lr"]), row["measures"][measure]["mean"]) for row in known]
        spread = [row["measures"][measure]["std"] or 0.0 for row in known]
        lost = [
            (float(run["choices"]["lr"]), run["measures"][measure])
            for run in results["runs"]
            if run["status"] == "diverged" and run["choices"]["norm-placement"] == placement
        ]
        marks = [(x, y) for x, y in lost if y is not None and math.isfinite(y)]
        lines.append(Line(name, color(placement), points, spread, marks))
    return Panel(x="learning rate", lines=lines, log_x=True, **panel)


def by_depth(results: Results, statistic: str, time: int, of: dict[str, str], **panel: Any) -> Panel:
    """Draw a statistic by layer, the geometric mean over seeds, at the first or the last interval."""
    lines = []
    for placement, name in NAMES.items():
        profiles = [
            profile[statistic][time]
            for profile in results["profiles"]
            if profile["choices"].items() >= ({"norm-placement": placement} | of).items()
        ]
        columns = enumerate(zip(*profiles, strict=True))
        known = [(layer, column) for layer, column in columns if all(column)]
        points = [(layer, statistics.geometric_mean(column)) for layer, column in known]
        if points:
            lines.append(Line(name, color(placement), points))
    return Panel(x="layer", lines=lines, **panel)


def variants(sweep: Results, studies: Sequence[Results]) -> str:
    """Draw the loss of each variant with its deviation over seeds, beside the sweep's at the same rate."""
    whole = [
        {**row, "choices": {"variant": row["choices"]["norm-placement"]}}
        for row in sweep["summary"]
        if row["choices"]["lr"] == RATE
    ]
    rows = [row for each in studies for row in each["summary"]] + whole
    rows = [row for row in rows if row["finished"]]
    rows.sort(key=lambda row: row["measures"]["validation_loss"]["mean"])
    means = [row["measures"]["validation_loss"] for row in rows]
    low = min(m["mean"] - (m["std"] or 0) for m in means)
    high = max(m["mean"] + (m["std"] or 0) for m in means)
    left, width, step = 230, 660, 22
    height = step * len(rows) + 52

    def x(value: float) -> float:
        return left + 10 + (value - low) / (high - low) * (width - left - 30)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'font-family="sans-serif" font-size="12" fill="#1b1f24">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for tick in range(math.ceil(low * 10), math.floor(high * 10) + 1):
        at = x(tick / 10)
        out.append(f'<path d="M{at:.1f} 8V{height - 40}" stroke="#e1e4e8"/>')
        out.append(f'<text x="{at:.1f}" y="{height - 24}" text-anchor="middle">{tick / 10:.1f}</text>')
    for index, (row, value) in enumerate(zip(rows, means, strict=True)):
        name, y = row["choices"]["variant"], 20 + index * step
        tint, spread = color(name.partition(",")[0]), value["std"] or 0.0
        name += "" if row["finished"] == row["seeds"] else f" ({row['finished']} of {row['seeds']} seeds)"
        out.append(f'<text x="{left}" y="{y + 4}" text-anchor="end">{name}</text>')
        first, last = (x(value["mean"] + sign * spread) for sign in (-1, 1))
        out.append(f'<path d="M{first:.1f} {y}H{last:.1f}" stroke="{tint}"/>')
        out.append(f'<circle cx="{x(value["mean"]):.1f}" cy="{y}" r="4" fill="{tint}"/>')
    out.append(f'<text x="{(left + width) / 2}" y="{height - 6}" text-anchor="middle">validation loss</text>')
    return "\n".join([*out, "</svg>", ""])


def figures(results: Callable[[str], Results]) -> dict[str, str]:
    """Return the figures by name."""
    sweep, longer = results("learning_rate"), results("longer")
    times = ((0, "at initialization"), (-1, "after training"))
    deep, rate = {"log_y": True}, {"lr": RATE}
    return {
        "learning-rate": draw(
            [
                over_rates(sweep, "validation_loss", title="Validation loss", y="loss"),
                over_rates(
                    sweep, "largest_activation", title="Largest activation", y="max |x|", log_y=True,
                    limit=(FP16_LARGEST, "FP16's largest number"),
                ),
            ]
        ),
        "variance": draw(
            [
                by_depth(sweep, "variance", time, rate, title=f"Variance {when}", y="variance", **deep)
                for time, when in times
            ]
        ),
        "gradients": draw(
            [
                by_depth(longer, "gradient_norm", time, {}, title=f"Gradient norm {when}", y="norm", **deep)
                for time, when in times
            ]
        ),
        "angular-distance": draw(
            [
                by_depth(longer, "angular_distance", time, {}, title=f"Angle {when}", y="angle / π")
                for time, when in times
            ]
        ),
        "ablations": variants(sweep, [results("ablations"), results("surroundings")]),
    }  # fmt: skip


def main() -> None:
    """Draw all figures."""
    of_figures = parser(__doc__)
    of_figures.add_argument("--output", type=Path, default=ROOT / "docs/images")
    options = of_figures.parse_args()
    for name, text in figures(reader(options.results)).items():
        write_text(options.output / f"reproduction-{name}.svg", text)
        print(options.output / f"reproduction-{name}.svg")


if __name__ == "__main__":
    main()
