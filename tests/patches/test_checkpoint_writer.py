"""Megatron's writer of distributed checkpoints opens its files as it is told."""

import inspect
import pickle
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_periln.patches import checkpoint_writer
from tests.cpu.unpatched import copy_of

opened = []


def remember(path, mode="r", *args, **kwargs):
    opened.append((path, mode))
    return Path(path).open(mode, *args, **kwargs)


@pytest.fixture
def remembering(monkeypatch):
    """The writer opens its files with `remember`; undone in the end."""
    writer = filesystem_async.FileSystemWriterAsync
    monkeypatch.setattr(writer, "get_save_function_and_args", writer.get_save_function_and_args)
    monkeypatch.setattr(filesystem_async, "open", open, raising=False)
    monkeypatch.setattr("tests.patches.test_checkpoint_writer.opened", [])
    checkpoint_writer.open_with(remember)


def test_every_file_of_tensors_is_opened_with_it(remembering, tmp_path, single_process):
    state = {"weight": dist_checkpointing.ShardedTensor.from_rank_offsets("weight", torch.ones(3))}
    dist_checkpointing.save(state, str(tmp_path), async_strategy="mcore")
    assert {(path, "wb") for path in map(str, tmp_path.glob("*.distcp"))} == set(opened)
    assert opened


def test_it_comes_along_to_another_process(remembering, single_process):
    """What is pickled names the functions of modules, which the other process imports."""
    writer = filesystem_async.FileSystemWriterAsync.__new__(filesystem_async.FileSystemWriterAsync)
    writer.write_buckets, writer.use_msc, writer.results_queue = [("path", "key", ([], []))], False, None
    write, _, _ = writer.get_save_function_and_args()
    assert pickle.loads(pickle.dumps(write)).args[0] is remember


def test_upstream_still_opens_its_files_by_the_name_of_the_builtin():
    upstream = copy_of(filesystem_async.__name__).FileSystemWriterAsync
    assert "open" in inspect.unwrap(upstream.write_preloaded_data).__code__.co_names
