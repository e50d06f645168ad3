"""Which non-persistent checkpoint Megatron finds, and what strict loading misses."""

import inspect
from argparse import Namespace
from types import SimpleNamespace

import pytest
from megatron.core.dist_checkpointing import validation
from megatron.core.rerun_state_machine import RerunStateMachine
from megatron.training import checkpointing

from megatron_periln.patches import checkpoint_choice
from tests.cpu.unpatched import copy_of


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


def saved_and_asked(asked):
    """What Megatron's check of keys is given: of a checkpoint with all kinds of state, and of one rank."""
    state = ["optimizer.state.exp_avg.weight", "chained_1.optimizer.state.exp_avg.weight", "rng_state"]
    keys = ["weight", *state, "rerun_state_machine_state"]
    return {key: SimpleNamespace(key=key) for key in keys}, [SimpleNamespace(key=key) for key in asked]


@pytest.mark.parametrize(
    ("optimizer", "asked", "missing"),
    [
        (True, ["weight"], set()),
        (False, ["weight"], {"optimizer.state.exp_avg.weight", "chained_1.optimizer.state.exp_avg.weight"}),
        (True, ["weight", "optimizer.state.exp_avg.weight"], {"chained_1.optimizer.state.exp_avg.weight"}),
        (True, ["rng_state", "other"], {"weight"}),
    ],
)
def test_state_that_is_left_out_as_a_whole_is_not_missing(monkeypatch, optimizer, asked, missing):
    upstream = copy_of(validation.__name__)
    monkeypatch.setattr(checkpoint_choice, "validation", upstream)
    checkpoint_choice.pass_over_unasked_state(optimizer=optimizer)
    saved, local = saved_and_asked(asked)
    found, unexpected = upstream._determine_missing_and_unexpected_keys(saved, local, [local])
    assert (found, unexpected) == (missing, {"other"} & set(asked))
    assert upstream._determine_missing_and_unexpected_keys(saved, local)[0] == set()  # not looked for


def test_upstream_still_misses_what_it_does_not_ask_for():
    upstream = copy_of(validation.__name__)
    saved, local = saved_and_asked(set(saved_and_asked([])[0]) - {"rerun_state_machine_state"})
    found, _ = upstream._determine_missing_and_unexpected_keys(saved, local, [local])
    assert found == {"rerun_state_machine_state"}
    assert "if rerun_state_machine.validate_state_dict(" in inspect.getsource(checkpointing.load_checkpoint)
    machine = inspect.getsource(RerunStateMachine.validate_state_dict)
    assert "state_dict['state'] == RerunState.NOT_RUNNING_YET:\n            return False" in machine
