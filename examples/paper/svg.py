"""Small line charts as SVG text: panels side by side, error bars, logarithmic axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 330, 230
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 34, 44
TEXT, GRID, LIMIT = "#1b1f24", "#e1e4e8", "#b00020"


@dataclass(frozen=True)
class Line:
    """Points of one line; ``spread`` is the length of its error bars, ``marks`` are drawn as crosses."""

    name: str
    color: str
    points: Sequence[tuple[float, float]]
    spread: Sequence[float] = ()
    marks: Sequence[tuple[float, float]] = ()
    dash: str = ""


@dataclass(frozen=True)
class Panel:
    """One pair of axes; ``limit`` is a level with a name."""

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    log_x: bool = False
    log_y: bool = False
    limit: tuple[float, str] | None = None
    y_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Axis:
    """Where values of ``low`` to ``high`` stand between two pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / ((high - low) or 1) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return about five round values, powers of ten on a long logarithmic axis."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            factors = (1, 2, 5) if last - first < 3 else (1,)
            powers = range(first, last + 1, max(1, (last - first + 3) // 5))
            ticks = [factor * 10.0**power for power in powers for factor in factors]
            return [tick for tick in ticks if self.low <= tick <= self.high]
        rough = (self.high - self.low) / 5 or 1
        unit = 10 ** math.floor(math.log10(rough))
        step = min((factor * unit for factor in (1, 2, 5, 10)), key=lambda s: abs(s - rough))
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def axis(values: Sequence[float], start: float, end: float, *, log: bool) -> Axis:
    """Return an axis that ``values`` fit on, with a margin."""
    low, high = min(values), max(values)
    if log:
        factor = (high / low) ** 0.06 or 1.1
        return Axis(low / factor, high * factor, start, end, log)
    margin = 0.06 * (high - low) or 0.5
    return Axis(low - margin, high + margin, start, end, log)


def number(value: float) -> str:
    """Return a tick's label."""
    if value and not 1e-2 <= abs(value) < 1e5:
        mantissa, _, power = f"{value:.5e}".partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".")
        return f"{'' if mantissa == '1' else mantissa + '·'}10{_superscript(int(power))}"
    return f"{value:,.6g}"


def _superscript(power: int) -> str:
    return str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _text(x: float, y: float, text: str, anchor: str = "middle", **style: object) -> str:
    more = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in style.items())
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(text)}</text>'


def _panel(panel: Panel, left: float) -> list[str]:
    points = [p for line in panel.lines for p in (*line.points, *line.marks)]
    bars = [
        y + sign * s
        for line in panel.lines
        for (_, y), s in zip(line.points, line.spread, strict=False)
        for sign in (-1, 1)
    ]
    values = list(panel.y_range or ([y for _, y in points] + [b for b in bars if b > 0 or not panel.log_y]))
    if panel.limit:
        values.append(panel.limit[0])
    x = axis([x for x, _ in points], left + LEFT, left + WIDTH - RIGHT, log=panel.log_x)
    y = axis(values, TOP + HEIGHT, TOP, log=panel.log_y)
    out = [_text((x.start + x.end) / 2, TOP - 12, panel.title, font_weight="bold")]
    for tick in y.ticks():
        out.append(f'<path d="M{x.start:.1f} {y(tick):.1f}H{x.end:.1f}" stroke="{GRID}"/>')
        out.append(_text(x.start - 6, y(tick) + 4, number(tick), "end"))
    labels = sorted({px for px, _ in points}) if panel.log_x else x.ticks()
    out += [_text(x(tick), y.start + 16, number(tick)) for tick in labels]
    out.append(_text((x.start + x.end) / 2, y.start + 34, panel.x))
    middle = (y.start + y.end) / 2
    out.append(_text(left + 12, middle, panel.y, transform=f"rotate(-90 {left + 12:.1f} {middle:.1f})"))
    if panel.limit:
        level = y(panel.limit[0])
        out.append(
            f'<path d="M{x.start:.1f} {level:.1f}H{x.end:.1f}" stroke="{LIMIT}" stroke-dasharray="5 4"/>'
        )
        out.append(_text(x.start + 4, level - 5, panel.limit[1], "start", fill=LIMIT))
    for line in panel.lines:
        out += _line(line, x, y)
    return out


def _line(line: Line, x: Axis, y: Axis) -> list[str]:
    path = "L".join(f"{x(px):.1f} {y(py):.1f}" for px, py in line.points)
    style = f'stroke="{line.color}" fill="none"'
    out = [f'<path d="M{path}" {style} stroke-width="2" stroke-dasharray="{line.dash}"/>'] if path else []
    for (px, py), spread in zip(line.points, line.spread, strict=False):
        low = py - spread if py > spread or not y.log else y.low
        out.append(f'<path d="M{x(px):.1f} {y(low):.1f}V{y(py + spread):.1f}" {style}/>')
    out += [
        f'<circle cx="{x(px):.1f}" cy="{y(py):.1f}" r="3" fill="{line.color}"/>' for px, py in line.points
    ]
    for px, py in line.marks:
        a, b = x(px), y(py)
        cross = f"M{a - 4:.1f} {b - 4:.1f}l8 8M{a - 4:.1f} {b + 4:.1f}l8 -8"
        out.append(f'<path d="{cross}" {style} stroke-width="2"/>')
    return out


def draw(panels: Sequence[Panel]) -> str:
    """Return the panels side by side as an SVG document, with one legend below."""
    names = {line.name: line for panel in panels for line in panel.lines}
    width, height = WIDTH * len(panels), TOP + HEIGHT + BOTTOM + 24
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'font-family="sans-serif" font-size="12" fill="{TEXT}">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for index, panel in enumerate(panels):
        out += _panel(panel, index * WIDTH)
    step = min(150, width / len(names))
    start = (width - step * len(names)) / 2
    for index, line in enumerate(names.values()):
        x, y = start + index * step + 10, height - 14
        dash = f'stroke-dasharray="{line.dash}"'
        out.append(f'<path d="M{x:.1f} {y - 4}h22" stroke="{line.color}" stroke-width="3" {dash}/>')
        out.append(_text(x + 28, y, line.name, "start"))
    return "\n".join([*out, "</svg>", ""])
