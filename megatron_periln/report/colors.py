"""One colour for each placement, told apart by colour-blind readers too (after Okabe and Ito)."""

from __future__ import annotations

__all__ = ["PALETTES", "PART_COLORS", "PLACEMENT_COLORS", "css_variables"]

PLACEMENT_COLORS: dict[str, tuple[str, str]] = {
    # light, dark
    "pre": ("#c44e00", "#ff9a4d"),
    "post": ("#0068a8", "#62b8f0"),
    "peri": ("#00805c", "#2fd3a2"),
    "output": ("#a8558a", "#eba6d2"),
    "other": ("#5f6670", "#a9b1bc"),
}

PART_COLORS: dict[str, tuple[str, str]] = {
    # Neighbours differ in lightness too.
    "part-0": ("#003b5c", "#9fd0f2"),
    "part-1": ("#2f86b8", "#3d92c9"),
    "part-2": ("#00543c", "#7fe3c4"),
    "part-3": ("#2a9070", "#2a9b7c"),
    "part-4": ("#8f3900", "#ffb37a"),
    "part-5": ("#cc6c33", "#d0733a"),
    "part-6": ("#632a50", "#f0bfdf"),
    "part-7": ("#a8558a", "#b8679b"),
    "part-8": ("#3d434b", "#c3cad2"),
    "part-9": ("#7b838d", "#848c96"),
}
"""The parts of a whole, one after the other."""

_PAGE_COLORS: dict[str, tuple[str, str]] = {
    "background": ("#ffffff", "#14171c"),
    "surface": ("#f5f6f8", "#1d2127"),
    "text": ("#1b1f24", "#e8eaed"),
    "muted": ("#59616b", "#a3abb5"),
    "grid": ("#e1e4e8", "#323840"),
    "limit": ("#b00020", "#ff7b8a"),
}

PALETTES: dict[str, dict[str, str]] = {
    theme: {name: pair[index] for name, pair in (_PAGE_COLORS | PLACEMENT_COLORS | PART_COLORS).items()}
    for index, theme in enumerate(("light", "dark"))
}


def css_variables(theme: str) -> str:
    """Return a theme's colours as CSS declarations."""
    return " ".join(f"--{name}: {color};" for name, color in PALETTES[theme].items())
