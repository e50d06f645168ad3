"""What each kind of rank of a run holds in its GPU's memory."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_periln.models.from_arguments import transformer_config
from megatron_periln.plan.costs.collectives import Sent
from megatron_periln.plan.model import stages
from megatron_periln.plan.model.arguments import buildable, run_arguments
from megatron_periln.plan.model.held import Held, at_its_peak, hold
from megatron_periln.plan.model.in_flight import passes
from megatron_periln.training.refusals import refusals_in_one_line

__all__ = ["RankPlan", "plan_ranks"]


@dataclass(frozen=True)
class RankPlan:
    """What one kind of rank holds.

    Attributes
    ----------
    rank
        The first of them.
    ranks_alike
        How many ranks of the job it stands for.
    name
        Such as "first stage", "stage 3" (of 1 to PP) or "last stage"; "every rank" without pipeline stages.
    pipeline_stage
        From 0.
    parameters
        On this rank.
    memory
        Bytes on the GPU by what they are, at the peak of a step. Allowances for NCCL and the CUDA context are
        not among them.
    microbatches_in_flight
        Whose activations are held at that moment, by virtual stage; there is one without virtual stages.
    saved_per_microbatch
        Bytes of activations that one microbatch saves for the backward pass, by virtual stage.
    host_memory
        Bytes in the node's memory: what ``--optimizer-cpu-offload`` puts there.
    layers
        Of the decoder, by virtual stage.
    sent
        Bytes that one microbatch has the model itself send, forward and backward through all virtual stages.
    buffers
        Bytes of the gradients that are reduced and of the parameters that are gathered, padding included, of
        what is ``"dense"`` and of what is an ``"expert"``'s.
    expert_parameters, replicated_parameters
        Of them those of experts, and those of the rest that each tensor-parallel rank has whole.
    """

    rank: int
    ranks_alike: int
    name: str
    pipeline_stage: int
    parameters: int
    memory: dict[str, int]
    microbatches_in_flight: tuple[int, ...]
    saved_per_microbatch: tuple[int, ...] = ()
    host_memory: dict[str, int] = field(default_factory=dict)
    layers: tuple[int, ...] = ()
    sent: Mapping[Sent, int] = field(default_factory=dict)
    buffers: dict[str, tuple[int, int]] = field(default_factory=dict)
    expert_parameters: int = 0
    replicated_parameters: int = 0

    @property
    def total(self) -> int:
        """Bytes on the GPU."""
        return sum(self.memory.values())


def plan_ranks(flags: Sequence[str], world_size: int) -> tuple[argparse.Namespace, list[RankPlan]]:
    """Return Megatron's validated arguments of a run, and what each kind of its ranks holds.

    Parameters
    ----------
    flags
        Those of the pretraining, without ``@FILE``.
    world_size
        The number of GPUs.

    Raises
    ------
    UsageError
        For flags that are wrong, or that Megatron refuses at that size.
    """
    args = run_arguments(flags, world_size)
    built = buildable(args)
    with refusals_in_one_line():
        config = transformer_config(built)
        kinds: dict[Any, Held] = {}
        plans = []
        for stage in range(args.pipeline_model_parallel_size):
            likeness = stages.likeness(args, config, stage)
            if likeness not in kinds:
                kinds[likeness] = hold(args, built, stages.first_rank(args, stage))
            plans.append(_plan(args, config, stage, kinds[likeness]))
    return args, plans


def _plan(args: argparse.Namespace, config: TransformerConfig, stage: int, held: Held) -> RankPlan:
    """Return the plan of a pipeline stage whose ranks hold ``held`` but for microbatches."""
    moving, in_flight = at_its_peak(passes(args, stage), held.passes)
    count = args.pipeline_model_parallel_size
    return RankPlan(
        rank=stages.first_rank(args, stage),
        ranks_alike=args.world_size // count,
        name=stages.name_of(stage, count),
        pipeline_stage=stage,
        parameters=held.parameters,
        memory={**held.memory, **moving},
        microbatches_in_flight=in_flight,
        saved_per_microbatch=tuple(sum(each.saved.values()) for each in held.passes),
        host_memory=held.host_memory,
        layers=tuple(len(part) for part in stages.layers_of(args, config, stage)),
        sent=held.sent,
        buffers=held.buffers,
        expert_parameters=held.expert_parameters,
        replicated_parameters=held.replicated_parameters,
    )
