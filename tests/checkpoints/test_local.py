"""Local checkpoints are summed up, found where they are intact, and compared before they are loaded."""

import itertools
import pickle
import sys
from argparse import Namespace
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from megatron_periln.checkpoints import local
from megatron_periln.errors import RankError, UsageError
from megatron_periln.norms import PERI
from megatron_periln.patches import local_checkpoints
from megatron_periln.training.placement_checkpoint import refuse_other_local_placement
from tests.checkpoints.damage import flip_a_bit


class State(NamedTuple):
    """What nvidia-resiliency-ext saves: Megatron's state dict, and what is common to all ranks of it."""

    common_state_dict: dict[str, Any]


class Request(NamedTuple):
    """A save that another process is to do."""

    async_fn: Any
    async_fn_args: tuple[Any, ...]


class Manager:
    """nvidia-resiliency-ext's manager of local checkpoints, of one rank, in its names and files."""

    def __init__(self, folder):
        self.local_ckpt_dir, self.latest_iteration = folder / "0", -1

    def _ckpt_id(self, iteration):
        return (iteration, 0, "")

    def _local_ckpt_path_from_id(self, key):
        return self.local_ckpt_dir / f"iter_{key[0]:07d}_{key[1]}_local.pt"

    def _save_fn(self, parts):
        for key, state in parts.items():
            self.local_ckpt_dir.mkdir(parents=True, exist_ok=True)
            torch.save(state.common_state_dict, self._local_ckpt_path_from_id(key))

    def save(self, state_dict, iteration, is_async=False):
        parts = {self._ckpt_id(iteration): state_dict}
        if is_async:
            return Request(self._save_fn, (parts,))
        self._save_fn(parts)
        return None

    def load(self):
        key = self._ckpt_id(self.latest_iteration)
        path = self._local_ckpt_path_from_id(key)
        return State(torch.load(path, weights_only=False)), key


@pytest.fixture
def manager(tmp_path, monkeypatch):
    """A manager with the guard of a Peri-LN run."""
    name = local_checkpoints._MODULE
    for end in itertools.accumulate(name.split("."), lambda left, right: f"{left}.{right}"):
        monkeypatch.setitem(sys.modules, end, ModuleType(end))
    monkeypatch.setattr(sys.modules[name], "LocalCheckpointManager", Manager, raising=False)
    for method in ("save", "load"):
        monkeypatch.setattr(Manager, method, getattr(Manager, method))
    args = settings(tmp_path)
    local.install(args, lambda saved: refuse_other_local_placement(args, PERI, saved))
    return Manager(tmp_path)


def settings(folder, **others):
    args = Namespace(non_persistent_ckpt_type="local", non_persistent_local_ckpt_dir=str(folder))
    vars(args).update(replication=None, checkpoint_verify="full", finetune=False, no_load_optim=None)
    # What the comparison with a saved model asks of any.
    vars(args).update(allow_model_changes=False, moe_use_upcycling=False, hybrid_layer_pattern=None)
    vars(args).update(position_embedding_type="rope", add_bias_linear=False)
    vars(args).update(swiglu=True, quick_geglu=False, squared_relu=False)
    vars(args).update(seq_length=1, micro_batch_size=4, data_parallel_size=1, gtp_weight_remat_size=1)
    vars(args).update(step_batch_size_schedule=None)
    vars(args).update(layernorm_zero_centered_gamma=False, layernorm_epsilon=1e-5, **others)
    return args


class Ranks:
    """One rank of several, the others as they are given."""

    def __init__(self, rank=0, others=()):
        self.rank, self.size, self.others = rank, 1 + len(others), others

    def gather(self, value):
        return [value, *self.others]

    def broadcast(self, value):
        return value


def saved(placement="peri", **others):
    return Namespace(norm_placement=placement, embedding_norm=True, layernorm_epsilon=1e-5, **others)


def newest(manager, ranks=None, **others):
    args = settings(manager.local_ckpt_dir.parent, **others)
    return local.newest_intact(args, ranks or Ranks())


@pytest.mark.parametrize("is_async", [False, True])
def test_damage_is_found(manager, is_async, capsys):
    for iteration in (3, 5):
        request = manager.save(State({"args": saved(), "weight": torch.ones(99)}), iteration, is_async)
        if is_async:
            request.async_fn(*request.async_fn_args)
    assert newest(manager) == 5
    damaged = manager._local_ckpt_path_from_id((5, 0, ""))
    flip_a_bit(damaged)
    assert newest(manager, checkpoint_verify="size") == 5
    assert newest(manager) == 3
    assert f"{damaged}: broken, and not used: it has checksum" in capsys.readouterr().out
    assert not damaged.exists(), "nvidia-resiliency-ext would take it"


def test_what_another_process_writes_is_summed_too(manager):
    """The save is pickled by the names of modules, which the other process imports."""
    write = manager.save(State({}), 1, is_async=True).async_fn
    assert pickle.loads(pickle.dumps(write.args[0])).func is local.sum_up


def test_every_rank_must_have_its_file(manager):
    for iteration in (3, 5):
        manager.save(State({}), iteration)
    assert newest(manager, Ranks(others=[[(3, 1), (4, 1)]])) == 3
    assert newest(manager, Ranks(others=[[(4, 1)]])) == -1
    manager.local_ckpt_dir.joinpath("iter_0000004_1_local.pt").touch()
    assert newest(manager, Ranks(others=[[(4, 0)]])) == -1, "no replicas: a rank reads its own"
    assert newest(manager, Ranks(others=[[(4, 0)]]), replication=True) == 4


def test_they_are_deleted_together(manager):
    """By the patterns of LocalCheckpointManager._cleanup and _my_ckpt_ids."""
    manager.save(State({}), 3)
    found = sorted(path.name for path in manager.local_ckpt_dir.glob("iter_*_*_local*.pt"))
    assert found == ["iter_0000003_0_local.crc32.pt", "iter_0000003_0_local.pt"]
    assert [int(name.split("_", 3)[1]) for name in found] == [3, 3]


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (saved("pre"), "has norm placement pre"),
        (saved("peri", output_norm_epsilon=0.1), "an output norm epsilon of 0.1"),
        (saved("peri", layernorm_zero_centered_gamma=True), "was trained with --apply-layernorm-1p"),
    ],
    ids=["placement", "epsilon", "weights"],
)
def test_another_model_is_refused(manager, theirs, message):
    manager.save(State({"args": theirs}), 5)
    manager.latest_iteration = 5
    with pytest.raises(UsageError, match=f"^the checkpoint in {manager.local_ckpt_dir.parent} .*{message}"):
        manager.load()


def test_the_same_model_is_loaded(manager):
    manager.save(State({"args": saved(), "iteration": 5}), 5)
    manager.latest_iteration = 5
    assert manager.load()[0].common_state_dict["iteration"] == 5


def test_a_file_that_cannot_be_read_is_one_line(manager):
    """Without a checksum, as stock Megatron's."""
    manager.save(State({"args": saved()}), 5)
    manager.latest_iteration = 5
    path = manager._local_ckpt_path_from_id((5, 0, ""))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(RankError, match=f"^{path} can't be read: .*; delete the local checkpoints"):
        manager.load()


@pytest.mark.parametrize(("schedule", "fits"), [("0:2 8:4", True), ("0:4 8:6", False)])
def test_only_batch_sizes_to_come_must_fit(tmp_path, schedule, fits):
    """Those that the local checkpoint has behind it were looked at, as if there were none."""
    args = settings(tmp_path, step_batch_size_schedule=schedule)
    trained = saved(consumed_train_samples=8)
    if fits:
        refuse_other_local_placement(args, PERI, trained)
        return
    with pytest.raises(UsageError, match="the global batch size of 6 after 8 samples is not divisible"):
        refuse_other_local_placement(args, PERI, trained)
