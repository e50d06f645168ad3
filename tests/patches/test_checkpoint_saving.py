"""What a guard sees of Megatron's saving of checkpoints, and that there is no other way to see it."""

import inspect
import shutil
from types import SimpleNamespace

import pytest
from megatron.training import checkpointing, training

from megatron_periln.errors import UsageError
from megatron_periln.patches import checkpoint_saving

TRACKER = "latest_checkpointed_iteration.txt"


class Guard:
    """Remembers what it sees."""

    def __init__(self, *, refuses=False):
        self.seen, self.refuses = [], refuses

    def before_training(self):
        self.seen.append("before training")
        if self.refuses:
            raise UsageError("not here")

    def before_save(self, folder, *, persistent):
        self.seen.append(("before" if persistent else "before non-persistent", folder.name))
        if self.refuses:
            raise UsageError("not here")

    def explain(self, folder, error):
        return UsageError(f"{folder.name}: {error}")

    def finalize(self, tracker, text):
        self.seen.append((tracker.name, text))


@pytest.fixture
def guarded(monkeypatch, tmp_path, single_process):
    """Guard a function that stands in for Megatron's ``save_checkpoint``, and return what calls it."""

    def guarded(guard, save, **settings):
        args = SimpleNamespace(save=str(tmp_path), **settings)
        monkeypatch.setattr(checkpoint_saving, "get_args", lambda: args)
        monkeypatch.setattr(training, "save_checkpoint", save)
        monkeypatch.setattr(training, "train_step", lambda step: step)
        monkeypatch.setattr(checkpointing, "maybe_msc", checkpointing.maybe_msc)
        checkpoint_saving.guard(guard)
        return training.save_checkpoint

    return guarded


def test_a_save_is_seen_and_its_tracker_is_left_to_the_guard(guarded, tmp_path):
    def save(iteration, **_):
        with checkpointing.maybe_msc.open(str(tmp_path / TRACKER), "w") as stream:
            stream.write(str(iteration))
        with checkpointing.maybe_msc.open(str(tmp_path / "other.txt"), "w") as stream:
            stream.write("written")

    guard = Guard()
    guarded(guard, save)(4)
    assert guard.seen == [("before", "iter_0000004"), (TRACKER, "4")]
    assert not (tmp_path / TRACKER).exists()
    assert (tmp_path / "other.txt").read_text() == "written"


def test_a_tracker_that_is_not_written_to_its_end_is_none(guarded, tmp_path):
    def save(iteration, **_):
        with checkpointing.maybe_msc.open(str(tmp_path / TRACKER), "w") as stream:
            stream.write(str(iteration))
            raise ZeroDivisionError("in between")

    guard = Guard()
    with pytest.raises(UsageError, match="iter_0000004: in between"):
        guarded(guard, save)(4)
    assert guard.seen == [("before", "iter_0000004")]


def test_a_refusal_comes_before_the_save(guarded):
    with pytest.raises(UsageError, match="not here"):
        guarded(Guard(refuses=True), lambda *_, **__: pytest.fail("saved"))(4)


def test_the_first_iteration_is_seen_once(guarded):
    guard = Guard()
    guarded(guard, None)
    assert guard.seen == []
    assert [training.train_step(step) for step in (1, 2)] == [1, 2]
    assert guard.seen == ["before training"]
    guarded(Guard(refuses=True), None)
    with pytest.raises(UsageError, match="not here"):
        training.train_step(1)


def test_local_checkpoints_are_not_guarded_here(guarded):
    guard = Guard()
    save = guarded(guard, lambda *_, **__: "saved", non_persistent_ckpt_type="local")
    assert save(4, non_persistent_ckpt=True) == "saved"
    assert guard.seen == []


@pytest.mark.parametrize("elsewhere", [None, "elsewhere"])
def test_global_non_persistent_checkpoints_are_guarded(guarded, tmp_path, elsewhere):
    folder = tmp_path / (elsewhere or "non_persistent")
    settings = {"non_persistent_ckpt_type": "global"}
    settings["non_persistent_global_ckpt_dir"] = elsewhere and str(folder)

    def save(iteration, **_):
        with checkpointing.maybe_msc.open(str(folder / TRACKER), "w") as stream:
            stream.write(str(iteration))

    guard = Guard()
    guarded(guard, save, **settings)(4, non_persistent_ckpt=True)
    assert guard.seen == [("before non-persistent", "iter_0000004"), (TRACKER, "4")]


def test_upstream_still_truncates_the_tracker():
    """Once it replaces that file whole, the half that is about ``maybe_msc`` may go."""
    source = inspect.getsource(checkpointing.save_checkpoint)
    assert "with maybe_msc.open(tracker_filename, 'w') as f:" in source


def test_upstream_still_has_no_hook_around_a_save():
    """`checkpoint_saving.guard` counts on the names, and a hook would be an argument."""
    assert list(inspect.signature(checkpointing.save_checkpoint).parameters) == [
        "iteration",
        "model",
        "optimizer",
        "opt_param_scheduler",
        "num_floating_point_operations_so_far",
        "checkpointing_context",
        "pipeline_rank",
        "expert_rank",
        "tensor_rank",
        "pipeline_parallel",
        "expert_parallel",
        "non_persistent_ckpt",
        "train_data_iterator",
        "preprocess_common_state_dict_fn",
        "release",
        "tp_group",
        "pp_group",
        "dp_cp_group",
        "dp_group",
        "expt_dp_group",
        "rng_state_key_prefix",
    ]
    assert "save_checkpoint(" in inspect.getsource(training.save_checkpoint_and_time)


def test_old_checkpoints_are_deleted_as_told(monkeypatch, tmp_path):
    monkeypatch.setattr(checkpointing, "shutil", checkpointing.shutil)
    deleted = []
    checkpoint_saving.delete_with(deleted.append)
    for iteration in (2, 4):
        (tmp_path / f"iter_{iteration:07d}").mkdir()
    checkpointing._async_delete_checkpoint_impl(str(tmp_path), 2)
    checkpointing.cleanup_old_non_persistent_checkpoint(tmp_path)
    assert deleted == [tmp_path / "iter_0000002"] * 2
    assert checkpointing.shutil.copy is shutil.copy


def test_upstream_still_deletes_old_checkpoints_under_their_names(monkeypatch, tmp_path):
    deleted = []
    monkeypatch.setattr(checkpointing, "shutil", SimpleNamespace(rmtree=deleted.append))
    checkpointing._async_delete_checkpoint_impl(str(tmp_path), 2)
    assert deleted == [str(tmp_path / "iter_0000002")]
