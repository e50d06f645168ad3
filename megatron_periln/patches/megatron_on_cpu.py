"""What is changed in Megatron to run on the CPU: one function per place.

This module imports megatron, so it is itself imported after `megatron_periln.patches.torch_on_cpu` is
installed.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async
from megatron.core.tensor_parallel import random
from megatron.core.transformer.moe import moe_utils, token_dispatcher

from megatron_periln.patches.registry import changes

__all__ = [
    "convert_split_sizes_on_the_cpu",
    "expect_the_cpu_generator_to_move",
    "install",
    "restore_recomputed_outputs_by_copying",
    "save_asynchronously_from_copies",
    "write_checkpoints_from_a_fork",
]

_STRATEGIES = "megatron.core.dist_checkpointing.strategies"


def install() -> None:
    """Install it all."""
    write_checkpoints_from_a_fork()
    save_asynchronously_from_copies()
    expect_the_cpu_generator_to_move()
    convert_split_sizes_on_the_cpu()
    restore_recomputed_outputs_by_copying()


@changes(
    f"{_STRATEGIES}.filesystem_async.get_write_results_queue",
    f"{_STRATEGIES}.async_utils.PersistentAsyncCaller._get_process",
    why="they use `spawn` and `forkserver`, because of CUDA, which imports torch and the main module "
    "again: seconds and hundreds of MB a rank; and there the GPU would be missing",
    until=(
        "patches/test_megatron_on_cpu.py::test_upstream_still_spawns_the_queue_of_the_checkpoint_writer",
        "patches/test_megatron_on_cpu.py::test_upstream_still_spawns_the_process_of_the_checkpoint_writer",
    ),
)
def write_checkpoints_from_a_fork() -> None:
    """Start the checkpoint writer's processes with ``fork``."""
    results_queue = filesystem_async.get_write_results_queue
    get_process = async_utils.PersistentAsyncCaller._get_process

    def from_a_fork(mp_mode: str = "fork") -> Any:
        return results_queue("fork")

    def process_from_a_fork(cls: Any, rank: int, mp_mode: str = "fork", *args: Any, **kwargs: Any) -> Any:
        return get_process(rank, "fork", *args, **kwargs)

    filesystem_async.get_write_results_queue = from_a_fork
    async_utils.PersistentAsyncCaller._get_process = classmethod(process_from_a_fork)


@changes(
    f"{_STRATEGIES}.filesystem_async.FileSystemWriterAsync.preload_tensors",
    why="it relies on the way from the GPU to make a copy of the tensors that training goes on to "
    "change while another process writes them",
    until="patches/test_megatron_on_cpu.py::test_upstream_still_preloads_tensors_without_a_copy",
)
def save_asynchronously_from_copies() -> None:
    """Copy tensors that are shared with the process that writes them, before training goes on."""
    filesystem_async.FileSystemWriterAsync.preload_tensors = staticmethod(_copies)


def _copies(buckets: list[Any], non_blocking: bool = True) -> list[Any]:
    """Stand in for ``preload_tensors``; of this module, for it is pickled by its name."""
    return [
        (path, key, (data, [(item, t.clone() if t.is_shared() else t) for item, t in tensors]))
        for path, key, (data, tensors) in buckets
    ]


@changes(
    "megatron.core.tensor_parallel.random.CudaRNGStatesTracker.fork",
    why="it warns if the CPU's random state changes while the device's is in use. Here they are the same",
    until="patches/test_megatron_on_cpu.py::test_upstream_still_warns_that_the_random_state_of_the_cpu_moved",
)
def expect_the_cpu_generator_to_move() -> None:
    """Drop the warning that the CPU's random state changed inside the device's."""
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


@changes(
    "megatron.core.transformer.moe.moe_utils.maybe_move_tensor_to_cpu",
    "megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu",
    why="it converts to numpy only what `is_cuda`, and the all-to-all dispatcher wants its split sizes so",
    until="patches/test_megatron_on_cpu.py::test_upstream_still_converts_cuda_tensors_only",
)
def convert_split_sizes_on_the_cpu() -> None:
    """Convert the split sizes of the all-to-all dispatcher for tensors that are on the CPU already."""
    move = moe_utils.maybe_move_tensor_to_cpu

    def convert(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if as_numpy and torch.is_tensor(tensor):
            return tensor.detach().numpy()
        return move(tensor, as_numpy, record_stream)

    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = convert


@changes(
    "megatron.core.tensor_parallel.random._get_share_storage",
    why="`CheckpointWithoutOutput` shares storages through an extension that it compiles on first use: "
    "half a minute, a C++ toolchain and ninja, to save a copy",
    until="patches/test_megatron_on_cpu.py::test_upstream_still_compiles_an_extension_to_restore_outputs",
)
def restore_recomputed_outputs_by_copying() -> None:
    """Copy recomputed outputs into the storages that were freed, instead of sharing them."""

    def copy_storage(restored: torch.Tensor, recomputed: torch.Tensor) -> None:
        source, target = recomputed.untyped_storage(), restored.untyped_storage()
        target.resize_(source.nbytes())
        target.copy_(source)

    random._get_share_storage = lambda: copy_storage
