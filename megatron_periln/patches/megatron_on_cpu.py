"""What is changed in Megatron to run on the CPU: one function per place.

This module imports megatron, so it is itself imported after `megatron_periln.patches.torch_on_cpu` is
installed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async
from megatron.core.ssm import mamba_mixer
from megatron.core.ssm.gated_delta_net import common, gdn
from megatron.core.tensor_parallel import random
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megatron_periln.patches.registry import changes

__all__ = [
    "compute_gated_delta_nets_with",
    "compute_mamba_layers_with",
    "convert_split_sizes_on_the_cpu",
    "expect_the_cpu_generator_to_move",
    "install",
    "restore_recomputed_outputs_by_copying",
    "save_asynchronously_from_copies",
    "write_checkpoints_from_a_fork",
]

_STRATEGIES = "megatron.core.dist_checkpointing.strategies"
_MIXER = "megatron.core.ssm.mamba_mixer"
_DELTA = "megatron.core.ssm.gated_delta_net"


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


@changes(
    f"{_MIXER}.HAVE_MAMBA_SSM",
    f"{_MIXER}.ExtendedRMSNorm",
    f"{_MIXER}.mamba_chunk_scan_combined",
    f"{_MIXER}.mamba_split_conv1d_scan_combined",
    f"{_MIXER}._check_mamba_sequence_packing_support",
    why="Mamba layers take the kernels of mamba-ssm and causal-conv1d, which need a GPU, and have no others",
    until="patches/test_megatron_on_cpu.py::test_upstream_still_has_no_mamba_layer_without_its_packages",
)
def compute_mamba_layers_with(
    *, norm: type, chunk_scan: Callable[..., Any], split_conv1d_scan: Callable[..., Any]
) -> None:
    """Let Mamba layers compute with other functions than mamba-ssm's."""

    def sharded_state_dict(
        self: Any, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> Any:
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )

    mamba_mixer.HAVE_MAMBA_SSM = True
    mamba_mixer.ExtendedRMSNorm = type(norm.__name__, (norm,), {"sharded_state_dict": sharded_state_dict})
    mamba_mixer.mamba_chunk_scan_combined = chunk_scan
    mamba_mixer.mamba_split_conv1d_scan_combined = split_conv1d_scan
    mamba_mixer._check_mamba_sequence_packing_support = lambda for_inference_not_training: (True, None)


@changes(
    f"{_DELTA}.common.HAVE_FLA",
    f"{_DELTA}.common.l2norm",
    f"{_DELTA}.gdn.causal_conv1d",
    f"{_DELTA}.gdn.chunk_gated_delta_rule",
    f"{_DELTA}.gdn.torch_chunk_gated_delta_rule",
    why="gated delta nets take the kernels of flash-linear-attention, which need a GPU, or with "
    "`--deterministic-mode` some of them and a rule of Megatron's in fp32 that knows of no documents",
    until="patches/test_megatron_on_cpu.py::test_upstream_still_has_no_delta_net_without_its_package",
)
def compute_gated_delta_nets_with(
    *, causal_conv1d: Callable[..., Any], l2norm: Callable[..., Any], rule: Callable[..., Any]
) -> None:
    """Let gated delta nets compute with other functions than flash-linear-attention's."""
    common.HAVE_FLA = True
    common.l2norm = l2norm
    gdn.causal_conv1d = causal_conv1d
    gdn.chunk_gated_delta_rule = gdn.torch_chunk_gated_delta_rule = rule
