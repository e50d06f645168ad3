"""Exports that are killed with SIGKILL: nothing has the final name, and the next export succeeds."""

import os
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from megatron_periln import files
from megatron_periln.convert import export as exporting
from megatron_periln.convert import parity_check, safetensors_folder
from megatron_periln.convert.export import ExportOptions, export

SHARDED = ExportOptions(shard_bytes=1, verify=False)
EXACT = ExportOptions(shard_bytes=1)


@pytest.fixture(scope="module")
def checkpoint(saved):
    return saved("peri").folder


def quietly(_):
    pass


def killed(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def before_any_tensor(patch):
    patch.setattr(exporting, "write_tensors", killed)


def between_shards(patch):
    stream = exporting.exported_tensors

    def tensors(*args):
        for number, item in enumerate(stream(*args)):
            yield killed() if number == 9 else item

    patch.setattr(exporting, "exported_tensors", tensors)


def within_a_shard(patch):
    save = safetensors_folder.save_file

    def save_half(tensors, path, **options):
        save(tensors, path, **options)
        if path.name == "9.part":
            os.truncate(path, path.stat().st_size // 2)
            killed()

    patch.setattr(safetensors_folder, "save_file", save_half)


def before_the_index(patch):
    patch.setattr(safetensors_folder, "finalize_shards", killed)


def before_the_parity_check(patch):
    patch.setattr(parity_check, "sample_tokens", killed)


def before_the_disk_has_it(patch):
    patch.setattr(files, "sync", killed)


def after_the_rename(patch):
    sync = files.sync
    patch.setattr(files, "sync", lambda path: killed() if (path / "model").exists() else sync(path))


MOMENTS = [
    before_any_tensor,
    between_shards,
    within_a_shard,
    before_the_index,
    before_the_parity_check,
    before_the_disk_has_it,
]


def start(run):
    """Run in a child process, and return its id."""
    child = os.fork()
    if child == 0:
        # The threads of its groups are not in the child.
        pytest.MonkeyPatch().setattr(torch.distributed, "is_initialized", lambda: False)
        try:
            run()
        finally:
            os._exit(1)
    return child


def ended_by(child):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return -os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError("the export neither ended nor was killed")


def export_killed(checkpoint, folder, moment, options=SHARDED):
    """Export in a process that is killed at a moment, and return its id."""

    def run():
        moment(pytest.MonkeyPatch())
        export(checkpoint, folder / "model", options, say=quietly)

    child = start(run)
    assert ended_by(child) == signal.SIGKILL
    return child


def check_next_export(checkpoint, exported, folder):
    """Export to the same name: it succeeds, is whole, and nothing else is left."""
    export(checkpoint, folder / "model", ExportOptions(verify=False), say=quietly)
    assert [path.name for path in folder.iterdir()] == ["model"]
    assert_whole(folder, exported)


def assert_whole(folder, exported):
    parts = sorted((folder / "model").glob("*.safetensors"))
    tensors = {name: tensor for part in parts for name, tensor in load_file(part).items()}
    expected = load_file(exported("peri")[0] / "model.safetensors")
    assert tensors.keys() == expected.keys()
    assert all(tensors[name].equal(expected[name]) for name in expected)


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: moment.__name__)
def test_a_kill_leaves_nothing_under_the_final_name(checkpoint, exported, tmp_path, moment):
    export_killed(checkpoint, tmp_path, moment, EXACT if moment is before_the_parity_check else SHARDED)
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(".tmp")
    check_next_export(checkpoint, exported, tmp_path)


def test_a_kill_after_the_rename_leaves_a_whole_model(checkpoint, exported, tmp_path):
    export_killed(checkpoint, tmp_path, after_the_rename)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert_whole(tmp_path, exported)


def test_exports_killed_one_after_the_other_leave_one_folder(checkpoint, exported, tmp_path):
    for moment in (before_any_tensor, between_shards, within_a_shard):
        child = export_killed(checkpoint, tmp_path, moment)
        assert [path.name for path in tmp_path.iterdir()] == [f"model.{child}.tmp"]
    check_next_export(checkpoint, exported, tmp_path)


def test_what_a_running_export_writes_is_not_removed(tmp_path):
    with files.new_folder(tmp_path / "model", flag="--output") as running:
        files.remove_abandoned(tmp_path / "model")
        assert running.is_dir()
