"""How many operations and tokens a step has, how long it takes at a given MFU, and how long the run."""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass

from megatron.training.training import num_floating_point_operations

from megatron_periln.plan.costs.schedule import Pipeline, bubble
from megatron_periln.plan.machine.gpus import Gpu

__all__ = ["Timing", "pipeline_of", "recomputed", "timing"]

_DAY = 86400


@dataclass(frozen=True)
class Timing:
    """A run's time.

    Attributes
    ----------
    tokens
        Of a step: the global batch's.
    flops
        Of a step: forward and backward, by Megatron's ``num_floating_point_operations``, which
        ``--log-throughput`` reports by. Recomputation is not in it.
    recomputed
        What recomputation adds to it, as a share.
    steps
        Of the run; None if the flags don't say.
    bubble
        The share of a step that ranks wait for other stages of the pipeline: for their turn, and for stages
        with more layers, or with the logits.
    ideal_bubble
        That share if all stages took equally long.
    mfu
        The share of the GPUs' BF16 peak that ``flops`` are to reach, FP8 or not.
    step_seconds
        Of a step at that MFU; None for a GPU whose peak is not known.
    """

    tokens: int
    flops: float
    recomputed: float
    steps: int | None
    bubble: float
    ideal_bubble: float
    mfu: float
    step_seconds: float | None

    @property
    def days(self) -> float | None:
        """Of the whole run."""
        if self.step_seconds is None or self.steps is None:
            return None
        return self.steps * self.step_seconds / _DAY


def timing(args: Namespace, gpu: Gpu, mfu: float, layers: Sequence[Sequence[int]] = ()) -> Timing:
    """Return the time of the run that validated ``args`` describe, at a share of the GPUs' peak.

    Parameters
    ----------
    args
        Megatron's arguments.
    gpu
        Whose peak it is.
    mfu
        The share.
    layers
        The decoder's layers by stage and virtual stage; without them, all are taken to be alike.
    """
    flops = _operations(args)
    seconds = flops / (args.world_size * gpu.bf16 * mfu) if gpu.bf16 else None
    return Timing(
        tokens=args.global_batch_size * args.seq_length,
        flops=flops,
        recomputed=recomputed(args),
        steps=_steps(args),
        bubble=bubble(pipeline_of(args), _stage_costs(args, layers)),
        ideal_bubble=bubble(pipeline_of(args)),
        mfu=mfu,
        step_seconds=seconds,
    )


def pipeline_of(args: Namespace) -> Pipeline:
    """Return the shape of the pipeline that validated arguments describe."""
    chunks = args.virtual_pipeline_model_parallel_size or 1
    return Pipeline(
        stages=args.pipeline_model_parallel_size,
        microbatches=args.global_batch_size // (args.micro_batch_size * args.data_parallel_size),
        chunks=chunks,
        group=args.microbatch_group_size_per_vp_stage if chunks > 1 else None,
        overlaps_experts=bool(args.overlap_moe_expert_parallel_comm),
    )


def _stage_costs(args: Namespace, layers: Sequence[Sequence[int]]) -> list[list[float]] | None:
    """Return how long stages compute, in layers: the last has the logits, too."""
    if sum(map(sum, layers)) != args.num_layers or args.hybrid_layer_pattern is not None:
        return None
    costs = [[float(count) for count in chunks] for chunks in layers]
    costs[-1][-1] += (_operations(args) / _of_layers(args) - 1) * args.num_layers
    return costs


def _operations(args: Namespace, **changes: object) -> float:
    changed = copy.copy(args)  # Megatron's function sets some arguments
    vars(changed).update(changes)
    return float(num_floating_point_operations(changed, args.global_batch_size))


def _steps(args: Namespace) -> int | None:
    if args.train_iters:
        return int(args.train_iters)
    if args.train_samples:
        return -(-int(args.train_samples) // int(args.global_batch_size))
    return None


def _of_layers(args: Namespace) -> float:
    """Return the operations of all but the logits."""
    return _operations(args, padded_vocab_size=0) if args.padded_vocab_size else _operations(args)


def _of_core_attention(args: Namespace) -> float:
    """Return those that grow with the square of the sequence."""
    tokens = args.global_batch_size * args.seq_length
    changed = copy.copy(args)
    without = num_floating_point_operations(
        changed, args.global_batch_size, seqlen_squared_sum_in_batch=0, total_real_tokens_in_batch=tokens
    )
    return _operations(args) - float(without)


def _of_dense_mlp(args: Namespace) -> float:
    return _operations(args) - _operations(args, ffn_hidden_size=0, moe_ffn_hidden_size=_moe_size(args))


def _of_experts(args: Namespace) -> float:
    if not args.num_experts:
        return 0.0
    without = {"moe_ffn_hidden_size": 0, "moe_shared_expert_intermediate_size": 0}
    return _operations(args) - _operations(args, **without)


def _moe_size(args: Namespace) -> int:
    return int(args.moe_ffn_hidden_size or args.ffn_hidden_size)


_RECOMPUTED = {"core_attn": _of_core_attention, "mlp": _of_dense_mlp, "moe": _of_experts}
"""What a module of ``--recompute-modules`` computes; norms and activations count as nothing."""


def recomputed(args: Namespace) -> float:
    """Return the operations that recomputation adds to a step, as a share of it.

    A forward is a third of forward and backward, so a third of what is recomputed.
    """
    if args.hybrid_layer_pattern is not None or args.recompute_granularity is None:
        return 0.0
    if args.recompute_granularity == "full":
        share = 1.0
        if args.recompute_method == "block":
            stages = args.pipeline_model_parallel_size * (args.virtual_pipeline_model_parallel_size or 1)
            share = min(1.0, args.recompute_num_layers * stages / args.num_layers)
        again = share * _of_layers(args)
    else:
        again = sum(_RECOMPUTED[module](args) for module in args.recompute_modules if module in _RECOMPUTED)
    return again / 3 / _operations(args)
