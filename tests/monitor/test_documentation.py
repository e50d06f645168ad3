"""docs/monitor.md says what the file holds, and the package says it in one place."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import megatron_periln
from megatron_periln.monitor.alerts import ALERTS
from megatron_periln.monitor.lines import HEADER, STEP
from megatron_periln.monitor.record import RunRecord
from megatron_periln.monitor.statistics import BACKWARD, FORWARD, STATISTICS
from tests.monitor.records import HEADER as SOME_HEADER
from tests.monitor.records import write

PAGE = (Path(__file__).parents[2] / "docs" / "monitor.md").read_text()


def table(head: str) -> dict[str, str]:
    """Return a table of the page whose first column is called ``head``."""
    (rows,) = re.findall(rf"^\| {head} \| \|\n\| --- \| --- \|\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    cells = [re.split(r"(?<!\\) ?\| ?", row) for row in rows.splitlines()]
    return {name.strip("`"): text.replace("\\|", "|") for _, name, text, _ in cells}


def test_statistics_are_those_of_the_page():
    page = table("statistic")
    assert page == {name: statistic.meaning for name, statistic in STATISTICS.items()}
    assert list(page) == list(STATISTICS)


def test_alerts_are_those_of_the_page():
    assert table("alert") == ALERTS


def test_lines_are_those_of_the_page():
    for kind, fields in {"run": HEADER, "step": STEP}.items():
        (item,) = re.findall(rf"^- `{kind}`: (.*?);$", PAGE, re.MULTILINE | re.DOTALL)
        assert set(fields) <= set(re.findall(r"`(\w+)`", item))


def test_a_name_stands_once_in_the_package():
    """The angle's is a word of its own, which sums and the tables of studies have too."""
    package = Path(megatron_periln.__file__).parent
    sources = {path: path.read_text() for path in package.rglob("*.py")}
    for name in STATISTICS.keys() - {"angular_distance"}:
        found = [path for path, text in sources.items() if f'"{name}"' in text or f"'{name}'" in text]
        assert found in ([], [package / "monitor" / "statistics.py"]), name


def test_a_statistic_is_of_one_pass():
    assert set(FORWARD) | set(BACKWARD) == set(STATISTICS.values())
    assert not set(FORWARD) & set(BACKWARD)


def test_the_recipe_for_pandas_works(tmp_path, monkeypatch):
    pytest.importorskip("pandas", reason="pandas is not installed")
    write(RunRecord.open(tmp_path / "monitor.jsonl", SOME_HEADER, 0), 1, 20)
    monkeypatch.chdir(tmp_path)
    recipes = [part.split("```")[0] for part in PAGE.split("```python\n")[1:]]
    assert recipes
    for recipe in recipes:
        exec(compile(recipe, "docs/monitor.md", "exec"), {})
