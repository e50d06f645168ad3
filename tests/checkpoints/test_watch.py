"""What is said while a save takes long, and of one that failed."""

import time
from pathlib import Path

import pytest

from megatron_periln.checkpoints.guard import SaveGuard
from megatron_periln.checkpoints.watch import SaveWatch
from megatron_periln.errors import RankError

FOLDER = Path("/runs/checkpoints/iter_0000004")


def test_a_slow_save_is_told_three_times(capsys):
    SaveWatch(0.002).begin(FOLDER)
    time.sleep(0.5)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("--save /runs/checkpoints: iter_0000004 is not on the disk after 0 s; ")
    assert "--distributed-timeout-minutes" in lines[0]


def test_a_save_that_ends_is_not_told(capsys):
    watch = SaveWatch(0.002)
    watch.begin(FOLDER)
    watch.end()
    time.sleep(0.2)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(5, "Input/output error"), "cannot be written: Input/output error; what "),
        (RuntimeError("Timed out waiting 600000ms for recv"), "a rank has waited 10 minutes for another"),
        (RuntimeError("Watchdog caught collective operation timeout"), "a rank has waited 10 minutes"),
        (RuntimeError("shapes differ"), None),
        (ConnectionResetError(104, "Connection reset by peer"), None),
    ],
)
def test_what_a_failed_save_raises(error, message):
    explained = SaveGuard(None, "full", 10).explain(FOLDER, error)
    if message is None:
        assert explained is error
    else:
        assert isinstance(explained, RankError)
        assert str(explained).startswith(f"{FOLDER}: {message}")
        assert str(explained).endswith("what latest_checkpointed_iteration.txt names is complete")
