"""Folders are tidied when a run takes them; tests/faults has what cut-off saves leave there."""

from megatron_periln.checkpoints.guard import tidy


def test_a_folder_that_is_not_there_yet_is_tidy(tmp_path):
    """As that of non-persistent checkpoints in a first run."""
    tidy(tmp_path / "non_persistent")
    assert not list(tmp_path.iterdir())
