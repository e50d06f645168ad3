"""A report's page, taken apart."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest


class Page(HTMLParser):
    """A page's tables, headings and data."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.loads: list[str] = []
        self._stack: list[str] = []
        self._json = ""
        self.feed(path.read_text(encoding="utf-8"))
        data = json.loads(self._json, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
        self.figures: dict[str, dict] = data["figures"]

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self._stack.append("json" if given.get("type") == "application/json" else tag)
        if tag in ("h2", "h3"):
            self.headings.append("")
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        self.loads += [given[name] for name in ("src", "href") if given.get(name)]

    def handle_endtag(self, tag):
        while self._stack and self._stack.pop() not in (tag, "json" if tag == "script" else tag):
            pass

    def handle_data(self, data):
        if "json" in self._stack:
            self._json += data
        elif "script" not in self._stack and "style" not in self._stack:
            self.text += data
            if self._stack and self._stack[-1] in ("h2", "h3"):
                self.headings[-1] += data
            if "tr" in self._stack and self.rows[-1]:
                self.rows[-1][-1] += data

    def table(self, first: str) -> list[list[str]]:
        """Return the table whose head starts with ``first``, head included."""
        start = next(number for number, row in enumerate(self.rows) if row[0] == first)
        return [row for row in self.rows[start:] if len(row) == len(self.rows[start])]

    def traces(self, name: str) -> list[dict]:
        return [trace for trace in self.figures[name]["data"] if "meta" in trace]
