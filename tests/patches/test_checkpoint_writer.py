"""Megatron's writer of distributed checkpoints opens its files as it is told, and its process is watched."""

import inspect
import pickle
import queue
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

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


def test_the_process_is_told_of_when_it_is_started(monkeypatch):
    caller, told, cancelled = async_utils.PersistentAsyncCaller, [], []
    for name in ("_persistent_queue", "_persistent_preload_q"):
        queue_ = SimpleNamespace(cancel_join_thread=partial(cancelled.append, name))
        monkeypatch.setattr(caller, name, queue_)

    def get_process(cls, rank):
        cls._persistent_process = cls._persistent_process or f"of rank {rank}"
        return cls._persistent_process

    monkeypatch.setattr(caller, "_persistent_process", None)
    monkeypatch.setattr(caller, "_get_process", classmethod(get_process))
    checkpoint_writer.when_started(told.append)
    assert [caller._get_process(3), caller._get_process(3)] == ["of rank 3"] * 2
    assert told == ["of rank 3"]
    assert cancelled == ["_persistent_queue", "_persistent_preload_q"]


def test_upstream_still_waits_for_a_writer_that_is_gone(monkeypatch):
    upstream, waits = copy_of(async_utils.__name__), []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 100:
            raise TimeoutError

    monkeypatch.setattr(upstream, "sleep", sleep)
    caller = upstream.PersistentAsyncCaller()
    monkeypatch.setattr(upstream.PersistentAsyncCaller, "_persistent_comp_q", queue.Queue())
    monkeypatch.setattr(upstream.PersistentAsyncCaller, "__del__", lambda self: None)
    caller.process = SimpleNamespace(is_alive=lambda: False, exitcode=-9)
    with pytest.raises(TimeoutError):
        caller.is_current_async_call_done(blocking=True, no_dist=True)


@pytest.fixture
def queues(monkeypatch):
    """How often a process was asked for, to hand on what was written."""
    asked = []
    monkeypatch.setattr(
        filesystem_async, "get_write_results_queue", lambda *_: asked.append("process") or queue.Queue()
    )
    monkeypatch.setattr(TorchDistSaveShardedStrategy, "save", UPSTREAM_S_SAVE)
    return asked


UPSTREAM_S_SAVE = copy_of(torch_strategies.__name__).TorchDistSaveShardedStrategy.save


def save(folder):
    folder.mkdir()
    state = {"weight": dist_checkpointing.ShardedTensor.from_rank_offsets("weight", torch.ones(3))}
    dist_checkpointing.save(state, str(folder), async_strategy="mcore")
    state["weight"].data = torch.zeros(3)
    assert dist_checkpointing.load(state, str(folder))["weight"].tolist() == [1, 1, 1]


def test_upstream_still_starts_a_process_to_save_without_one(queues, tmp_path, single_process):
    save(tmp_path / "saved")
    assert queues == ["process"]


def test_a_rank_that_saves_by_itself_starts_no_process(queues, tmp_path, single_process):
    asked = filesystem_async.get_write_results_queue
    checkpoint_writer.save_without_a_process()
    save(tmp_path / "first")
    save(tmp_path / "second")
    assert queues == []
    assert filesystem_async.get_write_results_queue is asked  # for a save that another process does
