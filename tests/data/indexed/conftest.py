"""What the tests of merging share: two datasets to merge, and the tool that merges them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.data.companions import SMALL, Result, build, refusal, run_tool


@pytest.fixture
def pair(tmp_path: Path) -> list[str]:
    return [build(tmp_path / "a", SMALL), build(tmp_path / "b", [[[7]], [[8, 9], [10]]])]


@pytest.fixture
def run_merge() -> Callable[..., Result]:
    return partial(run_tool, "merge_datasets")


@pytest.fixture
def merge_refused(tmp_path: Path) -> Callable[..., str]:
    return partial(refusal, "merge_datasets", tmp_path)
