"""How Megatron's writer of distributed checkpoints opens its files, and which processes it starts."""

from __future__ import annotations

import functools
import queue
import sys
from collections.abc import Callable
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_periln.patches.registry import changes

__all__ = ["open_with", "save_without_a_process", "when_started"]

_STRATEGIES = "megatron.core.dist_checkpointing.strategies"
_MODULE = f"{_STRATEGIES}.filesystem_async"


@changes(
    f"{_MODULE}.FileSystemWriterAsync.get_save_function_and_args",
    f"{_MODULE}.open",
    why="checksums are computed while the files are written, and the writer has no place for that",
    until="patches/test_checkpoint_writer.py::test_upstream_still_opens_its_files_by_the_name_of_the_builtin",
)
def open_with(opener: Callable[..., Any]) -> None:
    """Let the writer open its files with ``opener``, as it would with ``open``.

    The writer's function may run in another process, which ``opener`` and this module then come to with it:
    pickled by their names.
    """
    original = FileSystemWriterAsync.get_save_function_and_args

    @functools.wraps(original)
    def with_opener(self: Any) -> Any:
        write, preload, args = original(self)
        return (None if write is None else functools.partial(_write, opener, write)), preload, args

    FileSystemWriterAsync.get_save_function_and_args = with_opener


@changes(
    f"{_STRATEGIES}.torch.TorchDistSaveShardedStrategy.save",
    f"{_MODULE}.get_write_results_queue",
    why="the first save of each rank starts a process that hands on what was written, also where the rank "
    "writes by itself and waits for it: on a GPU the process imports torch, seconds and hundreds of MB",
    until="patches/test_checkpoint_writer.py::test_upstream_still_starts_a_process_to_save_without_one",
)
def save_without_a_process() -> None:
    """Let a rank that writes a checkpoint by itself tell itself what it wrote through a queue of its own."""
    save = TorchDistSaveShardedStrategy.save

    @functools.wraps(save)
    def save_here(self: Any, *args: Any, **kwargs: Any) -> Any:
        for_processes = filesystem_async.get_write_results_queue
        filesystem_async.get_write_results_queue = lambda *_, **__: queue.Queue()
        try:
            return save(self, *args, **kwargs)
        finally:
            filesystem_async.get_write_results_queue = for_processes

    TorchDistSaveShardedStrategy.save = save_here


@changes(
    f"{_STRATEGIES}.async_utils.PersistentAsyncCaller._get_process",
    why="a rank waits at a queue for the process that writes its checkpoints, and so forever if that process "
    "is killed, as when memory runs short; at its end, for what it has put there to be read, too. Megatron "
    "has no hook for its start, from which on it is watched",
    until="patches/test_checkpoint_writer.py::test_upstream_still_waits_for_a_writer_that_is_gone",
)
def when_started(call: Callable[[Any], None]) -> None:
    """Call ``call`` with the process of ``--use-persistent-ckpt-worker`` once it has been started."""
    get_process = PersistentAsyncCaller._get_process

    def watched(cls: Any, *args: Any, **kwargs: Any) -> Any:
        before = cls._persistent_process
        process = get_process(*args, **kwargs)
        if process is not before:
            # Python would wait for the queues to be read when a rank that has failed ends.
            for queue in (cls._persistent_queue, cls._persistent_preload_q):
                queue.cancel_join_thread()
            call(process)
        return process

    PersistentAsyncCaller._get_process = classmethod(watched)


def _write(opener: Callable[..., Any], write: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Call the writer, whose module then has an ``open`` of its own in front of the builtin."""
    module: Any = sys.modules[FileSystemWriterAsync.__module__]
    module.open = opener
    write(*args, **kwargs)
