"""Runs to report on, and the tool."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tests.report.synthetic import write_run

TOOL = Path(__file__).parents[2] / "tools" / "report.py"


@pytest.fixture(scope="session")
def tool() -> ModuleType:
    return importlib.import_module("megatron_periln.tools.report")


@pytest.fixture
def report(tool: ModuleType, tmp_path: Path) -> Callable[..., Path]:
    """Write the report of runs; return the page."""

    def write(*runs: Path, title: str | None = None) -> Path:
        page = tmp_path / "report.html"
        arguments = [*map(str, runs), "--output", str(page), *(["--title", title] if title else [])]
        assert tool.main(arguments) == 0
        return page

    return write


@pytest.fixture(scope="session")
def four_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A run of each placement."""
    folder = tmp_path_factory.mktemp("runs")
    return [
        write_run(folder / placement, placement, lr=1e-3 if placement == "post" else 2e-3)
        for placement in ("pre", "post", "peri", "output")
    ]
