"""When each microbatch's activations are held: Megatron's own orders of pipeline schedules."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from unittest import mock

from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table
from megatron.core.transformer.cuda_graphs import convert_schedule_table_to_order

__all__ = ["microbatches", "passes"]


def microbatches(args: Namespace) -> int:
    """Return the microbatches that each data-parallel rank has in a step, of the full batch."""
    parallel = args.world_size // (
        args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
    )
    return max(1, args.global_batch_size // (args.micro_batch_size * parallel))


def passes(args: Namespace, stage: int) -> list[tuple[int, bool]]:
    """Return the passes of a step on a pipeline stage in order: the virtual stage, and whether it is forward.

    Of ``forward_backward_pipelining_with_interleaving`` and ``..._without_interleaving``
    (megatron/core/pipeline_parallel/schedules.py), whose functions say the warm-up and the order.
    """
    virtual = args.virtual_pipeline_model_parallel_size
    chunks, count = virtual or 1, microbatches(args)
    group = args.microbatch_group_size_per_vp_stage or args.pipeline_model_parallel_size
    with (
        mock.patch.object(parallel_state, "get_pipeline_model_parallel_rank", lambda: stage),
        mock.patch.object(
            parallel_state,
            "get_pipeline_model_parallel_world_size",
            lambda: args.pipeline_model_parallel_size,
        ),
        mock.patch.object(parallel_state, "get_virtual_pipeline_model_parallel_world_size", lambda: virtual),
    ):
        total, _, warm_up, _ = get_pp_rank_microbatches(
            count,
            chunks,
            group,
            overlap_moe_expert_parallel_comm=args.overlap_moe_expert_parallel_comm,
        )
    if virtual:
        order = convert_schedule_table_to_order(warm_up, chunks, get_schedule_table(count, chunks, group))
        return [(abs(chunk) - 1, chunk > 0) for chunk in order]
    return list(_one_forward_one_backward(total, warm_up))


def _one_forward_one_backward(total: int, warm_up: int) -> Iterator[tuple[int, bool]]:
    yield from [(0, True)] * warm_up
    yield from [(0, True), (0, False)] * (total - warm_up)
    yield from [(0, False)] * warm_up
