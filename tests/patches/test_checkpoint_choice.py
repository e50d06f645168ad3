"""Which non-persistent checkpoint Megatron finds."""

import inspect
from argparse import Namespace

import pytest
from megatron.training import checkpointing

from megatron_periln.patches import checkpoint_choice


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(
        checkpointing, "_get_non_persistent_iteration", checkpointing._get_non_persistent_iteration
    )
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("8")
    return tmp_path


def found(folder):
    args = Namespace(non_persistent_ckpt_type="global")
    return checkpointing._get_non_persistent_iteration(str(folder), args)


def test_one_is_replaced_and_no_other(folder):
    checkpoint_choice.replace_non_persistent({8: 6})
    assert found(folder) == 6
    (folder / "latest_checkpointed_iteration.txt").write_text("10")
    assert found(folder) == 10


def test_it_can_be_none(folder):
    checkpoint_choice.replace_non_persistent({8: -1})
    assert found(folder) == -1


def test_upstream_still_prefers_the_non_persistent_to_the_one_asked_for(folder):
    """Once ``--ckpt-step`` is heard, `sources.take` has less to do."""
    source = inspect.getsource(checkpointing._load_base_checkpoint)
    asked = source.index("iteration = args.ckpt_step")
    assert asked < source.index("if non_persistent_iteration >= iteration:")
    assert "ckpt_step" not in inspect.getsource(checkpointing._get_non_persistent_iteration)
