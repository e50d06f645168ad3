"""The status with which training ends where Megatron gives none."""

import io
import sys

import pytest

from megatron_periln import pretrain


def ended(way_out, file):
    """Return the end of a program in that file which leaves as it says."""
    try:
        exec(compile(way_out, file, "exec"), {"sys": sys})
    except SystemExit as end:
        return end
    raise AssertionError("it went on")


@pytest.mark.parametrize(
    ("way_out", "file", "failed"),
    [
        ("sys.exit()", "/site-packages/megatron/training/checkpointing.py", True),
        ("sys.exit(0)", "/site-packages/megatron/training/training.py", False),
        ("sys.exit(3)", "/site-packages/megatron/training/training.py", False),
        ("import _sitebuiltins; _sitebuiltins.Quitter('exit', '')()", "/a/megatron/training/x.py", False),
        ("sys.exit()", "/site-packages/other/package/module.py", False),
    ],
)
def test_what_megatron_leaves_by_as_it_can_not_go_on_is_a_failure(monkeypatch, way_out, file, failed):
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # which exit() closes
    failure = pretrain._failure(ended(way_out, file))
    assert (failure is not None) is failed
    if failed:
        assert "as failed (megatron/training/checkpointing.py:1)" in str(failure)
