from pathlib import Path

import pytest


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a run's file goes; its folder is not there yet."""
    return tmp_path / "run" / "monitor.jsonl"
