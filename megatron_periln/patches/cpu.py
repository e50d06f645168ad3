"""What Megatron itself needs changed to run on the CPU: one function per place."""

from __future__ import annotations

import logging
from typing import Any

import torch

__all__ = ["install_after_import", "install_before_import"]


def _compile_nothing() -> None:
    """``torch.compile`` returns its argument.

    Megatron decorates functions with it while it is being imported (megatron/core/jit.py,
    moe/router.py), before any flag could say otherwise; compiling them would need a C++ toolchain
    and minutes for what runs in milliseconds.
    """

    def compile(model: Any = None, **_: Any) -> Any:
        return (lambda function: function) if model is None else model

    torch.compile = compile


def _write_checkpoints_from_a_fork() -> None:
    """Start the checkpoint writer's processes with ``fork``.

    megatron/core/dist_checkpointing/strategies/filesystem_async.py and async_utils.py use ``spawn`` and
    ``forkserver``, because of CUDA, which imports torch and the main module again: seconds and hundreds
    of MB a rank; and there the GPU would be missing.
    """
    import megatron.core.dist_checkpointing.strategies.async_utils as async_utils
    import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem_async

    results_queue = filesystem_async.get_write_results_queue
    caller = async_utils.PersistentAsyncCaller
    get_process = caller._get_process

    def from_a_fork(mp_mode: str = "fork") -> Any:
        return results_queue("fork")

    def process_from_a_fork(cls: Any, rank: int, mp_mode: str = "fork", *args: Any, **kwargs: Any) -> Any:
        return get_process(rank, "fork", *args, **kwargs)

    filesystem_async.get_write_results_queue = from_a_fork
    caller._get_process = classmethod(process_from_a_fork)


def _save_asynchronously_from_copies() -> None:
    """Copy tensors that are shared with the process that writes them, before training goes on.

    ``FileSystemWriterAsync.preload_tensors`` (megatron/core/dist_checkpointing/strategies/
    filesystem_async.py) relies on the way from the GPU to make a copy.
    """
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    FileSystemWriterAsync.preload_tensors = staticmethod(_copies)


def _copies(buckets: list[Any], non_blocking: bool = True) -> list[Any]:
    """Stand in for ``preload_tensors``; of this module, for it is pickled by its name."""
    return [
        (path, key, (data, [(item, t.clone() if t.is_shared() else t) for item, t in tensors]))
        for path, key, (data, tensors) in buckets
    ]


def _expect_the_cpu_generator_to_move() -> None:
    """Drop the warning that the CPU's random state changed inside the device's.

    ``CudaRNGStatesTracker.fork`` (megatron/core/tensor_parallel/random.py) watches the CPU's
    generator while the device's is in use. Here they are the same.
    """
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


def _split_sizes_are_on_the_cpu() -> None:
    """Convert the split sizes of the all-to-all dispatcher for tensors that are on the CPU already.

    ``maybe_move_tensor_to_cpu`` (megatron/core/transformer/moe/moe_utils.py) converts to numpy
    only what ``is_cuda``.
    """
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    move = moe_utils.maybe_move_tensor_to_cpu

    def convert(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if as_numpy and torch.is_tensor(tensor):
            return tensor.detach().numpy()
        return move(tensor, as_numpy, record_stream)

    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = convert


def _restore_recomputed_outputs_by_copying() -> None:
    """Copy recomputed outputs into the storages that were freed, instead of sharing them.

    ``CheckpointWithoutOutput`` (megatron/core/tensor_parallel/random.py) shares storages through an
    extension that it compiles on first use: half a minute, a C++ toolchain and ninja, to save a
    copy.
    """
    import megatron.core.tensor_parallel.random as random

    def copy_storage(restored: torch.Tensor, recomputed: torch.Tensor) -> None:
        source, target = recomputed.untyped_storage(), restored.untyped_storage()
        target.resize_(source.nbytes())
        target.copy_(source)

    random._get_share_storage = lambda: copy_storage


def _keep_data_loaders_off_the_devices_generator() -> None:
    """Give each data loader a generator of its own.

    torch's ``DataLoader`` draws a seed from the CPU's generator whenever it is iterated. Here that
    generator is the device's too, which Megatron restores before it builds its loaders: the draw
    would change what dropout does after a resume.
    """
    init = torch.utils.data.DataLoader.__init__

    def with_own_generator(self: Any, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("generator") is None:
            kwargs["generator"] = torch.Generator().manual_seed(torch.initial_seed())
        init(self, *args, **kwargs)

    torch.utils.data.DataLoader.__init__ = with_own_generator  # type: ignore[method-assign]


def install_before_import() -> None:
    """Install what must precede the import of megatron."""
    _compile_nothing()
    _keep_data_loaders_off_the_devices_generator()


def install_after_import() -> None:
    """Install what changes modules of megatron."""
    _write_checkpoints_from_a_fork()
    _save_asynchronously_from_copies()
    _expect_the_cpu_generator_to_move()
    _split_sizes_are_on_the_cpu()
    _restore_recomputed_outputs_by_copying()
