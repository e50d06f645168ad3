"""Megatron in a world of one process."""

from __future__ import annotations

import torch

__all__ = ["start_megatron"]


def start_megatron(device: str, micro_batch_size: int, num_microbatches: int = 1) -> None:
    """Start Megatron on ``device``, ``"cuda"`` or ``"cpu"``."""
    if device == "cpu":
        from megatron_periln import cpu

        cpu.activate()
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator

    from megatron_periln import fixes

    fixes.apply()
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    batch = micro_batch_size * num_microbatches
    init_num_microbatches_calculator(0, None, batch, micro_batch_size, 1, False)
