"""What one rank holds: what is there all the time, and what a step's microbatches add to it."""

from __future__ import annotations

import contextlib
import io
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import unwrap_model
from torch.nn import Parameter

from megatron_periln.plan.costs.collectives import CountCollectives, Sent
from megatron_periln.plan.model.chunks import (
    ACTIVATIONS,
    LOGITS,
    WORKING,
    Pass,
    build_chunks,
    run_chunk,
    without_memory,
)
from megatron_periln.plan.model.engine import standing_in
from megatron_periln.plan.model.fake_job import fake_rank
from megatron_periln.plan.model.optimizer_state import optimizer_state
from megatron_periln.plan.model.routing import evenly_routed
from megatron_periln.plan.model.storages import bytes_of

__all__ = ["Held", "at_its_peak", "hold"]

WEIGHTS, GRADIENTS, EIGHT, BUFFERS = "weights", "gradients", "weights in FP8", "buffers"


@dataclass(frozen=True)
class Held:
    """What one rank holds.

    Attributes
    ----------
    parameters
        Their number.
    memory
        Bytes by what they are, of what is there all the time.
    host_memory
        The same in the node's memory.
    passes
        What a microbatch adds, by virtual stage.
    sent, buffers, expert_parameters, replicated_parameters
        As in `ranks.RankPlan`.
    """

    parameters: int
    memory: dict[str, int]
    host_memory: dict[str, int]
    passes: tuple[Pass, ...]
    sent: Counter[Sent]
    buffers: dict[str, tuple[int, int]]
    expert_parameters: int
    replicated_parameters: int


def hold(args: Namespace, buildable: Namespace, rank: int) -> Held:
    """Build a rank's model, buffers and optimizer, and run a microbatch through each of its chunks.

    Parameters
    ----------
    args
        The run's.
    buildable
        The same, as `arguments.buildable` returns them.
    rank
        Which rank.
    """
    with (
        fake_rank(buildable, rank),
        without_memory(),
        standing_in(args),
        evenly_routed(),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        chunks = build_chunks(buildable)
        eight = list(_mark_fp8(args, chunks))
        state = optimizer_state(args, buildable, chunks)
        with CountCollectives() as counted:
            passes = tuple(run_chunk(buildable, chunk) for chunk in chunks)
        parameters = [parameter for chunk in chunks for parameter in unwrap_model(chunk).parameters()]
        of_kind = {
            "dense": [buffer for chunk in chunks for buffer in chunk.buffers],
            "expert": [buffer for chunk in chunks for buffer in chunk.expert_parallel_buffers],
        }
        buffers = [buffer for each in of_kind.values() for buffer in each]
        flat = [buffer.param_data for buffer in buffers if buffer.param_data is not None]
        elements = sum(weight.numel() for weight in eight)
        primary = elements if args.fp8_param_gather or args.fp4_param_gather else 0
        on_host = args.optimizer_offload_fraction if args.optimizer_cpu_offload else 0.0
        memory = {
            WEIGHTS: bytes_of([*parameters, *flat]) - primary,  # one byte an element instead of two
            EIGHT: 2 * elements - primary,
            GRADIENTS: bytes_of(buffer.grad_data for buffer in buffers),
            **{name: size - round(on_host * size) for name, size in state.items()},
            BUFFERS: passes[0].left + sum(max(0, each.left) for each in passes[1:]),
        }
        return Held(
            parameters=sum(parameter.numel() for parameter in parameters),
            memory={name: size for name, size in memory.items() if size or name in state},
            host_memory={name: round(on_host * size) for name, size in state.items() if on_host},
            passes=passes,
            sent=counted.sent,
            buffers={
                kind: (
                    bytes_of(buffer.grad_data for buffer in each),
                    bytes_of(buffer.param_data for buffer in each if buffer.param_data is not None),
                )
                for kind, each in of_kind.items()
                if each
            },
            expert_parameters=sum(weight.numel() for weight in parameters if _is_expert(weight)),
            replicated_parameters=sum(
                weight.numel()
                for weight in parameters
                if not _is_expert(weight) and not getattr(weight, "tensor_model_parallel", False)
            ),
        )


def _is_expert(weight: Parameter) -> bool:
    return not getattr(weight, "allreduce", True)


def _mark_fp8(args: Namespace, chunks: Sequence[Any]) -> Iterator[Parameter]:
    """Yield the weights that Transformer Engine multiplies in FP8, marked for `engine.standing_in`."""
    if not (args.fp8 or args.fp4) or args.transformer_impl == "local":
        return
    first = args.num_layers_at_start_in_bf16 if args.first_last_layers_bf16 else 0
    last = args.num_layers - (args.num_layers_at_end_in_bf16 if args.first_last_layers_bf16 else 0)
    for chunk in chunks:
        for layer in unwrap_model(chunk).modules():
            if isinstance(layer, TransformerLayer) and first < layer.layer_number <= last:
                for module in layer.modules():
                    if isinstance(module, ColumnParallelLinear | RowParallelLinear):
                        module.weight.in_fp8 = True
                        yield module.weight


def at_its_peak(
    order: Sequence[tuple[int, bool]], passes: Sequence[Pass]
) -> tuple[dict[str, int], tuple[int, ...]]:
    """Return by kind what a step's microbatches hold when they hold most, and how many do.

    Parameters
    ----------
    order
        The passes of the step, as `in_flight.passes` returns them.
    passes
        What each virtual stage holds in one.

    Returns
    -------
    dict, tuple
        Bytes by kind; by virtual stage the microbatches whose activations are held, that which is just
        running among them.
    """
    counts, held = [0] * len(passes), 0
    saved = [sum(each.saved.values()) for each in passes]
    highest, moment = -1, (0, True, tuple(counts))
    for chunk, forward in order:
        if not forward:
            counts[chunk] -= 1
            held -= saved[chunk]
        now = held + sum((passes[chunk].forward if forward else passes[chunk].backward).values())
        if now > highest:
            highest, moment = now, (chunk, forward, tuple(counts))
        if forward:
            counts[chunk] += 1
            held += saved[chunk]
    chunk, forward, others = moment
    sums: Counter[str] = Counter({ACTIVATIONS: 0, LOGITS: 0, WORKING: 0})
    sums.update(passes[chunk].forward if forward else passes[chunk].backward)
    for number, each in zip(others, passes, strict=True):
        sums.update({kind: number * size for kind, size in each.saved.items()})
    running = tuple(number + (index == chunk) for index, number in enumerate(others))
    return {kind: size for kind, size in sums.items() if size or kind == ACTIVATIONS}, running
