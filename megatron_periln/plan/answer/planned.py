"""One layout, planned: what each kind of rank needs, and what a step and the run cost."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_periln.flag_files import without
from megatron_periln.plan.costs.checkpoint import Checkpoint, bytes_per_parameter
from megatron_periln.plan.costs.communication import (
    Buffers,
    Traffic,
    in_model,
    of_context,
    of_embedding,
    of_gradients,
    of_pipeline,
    of_rank,
)
from megatron_periln.plan.costs.timing import Timing, pipeline_of, timing
from megatron_periln.plan.machine.gpus import ALLOWANCES, Gpu
from megatron_periln.plan.machine.links import Layout
from megatron_periln.plan.ranks import RankPlan, plan_ranks

# What wants a file to write to, and holds nothing on a GPU between steps.
_WRITTEN = ("--monitor-layers",)

__all__ = ["Machine", "Need", "Planned", "plan_layout"]


@dataclass(frozen=True)
class Machine:
    """What a run is planned for.

    Attributes
    ----------
    gpu
        The kind of GPU.
    node
        How many of them share NVLink.
    mfu
        The share of their BF16 peak that the run is to reach.
    disk
        Bytes/s that all ranks together write.
    """

    gpu: Gpu
    node: int
    mfu: float
    disk: float


@dataclass(frozen=True)
class Need:
    """What one kind of rank needs of its GPU.

    Attributes
    ----------
    rank
        The kind.
    memory
        Bytes by what: the tensors of the plan, and the allowances.
    traffic
        What it sends in a step, the busiest group first.
    """

    rank: RankPlan
    memory: dict[str, int]
    traffic: tuple[Traffic, ...] = ()

    @property
    def bytes(self) -> int:
        """All of it."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class Planned:
    """A run in one layout, on one machine.

    Attributes
    ----------
    label
        What tells it from the others that it is compared with.
    args
        Megatron's arguments, validated.
    machine
        What it is to fit.
    needs
        What each kind of rank needs, by stage.
    timing, checkpoint
        Of the whole run.
    """

    label: str
    args: Namespace
    machine: Machine
    needs: tuple[Need, ...]
    timing: Timing
    checkpoint: Checkpoint

    @cached_property
    def fullest(self) -> Need:
        """The kind of rank that needs most."""
        return max(self.needs, key=lambda need: need.bytes)

    @property
    def left(self) -> int:
        """Bytes that the fullest rank leaves of its GPU; negative if it doesn't fit."""
        return self.machine.gpu.memory - self.fullest.bytes

    @property
    def fits(self) -> bool:
        """Whether each kind of rank fits the GPU."""
        return self.left >= 0

    @property
    def layout(self) -> str:
        """How the job is split, in the order of Megatron's ranks."""
        args = self.args
        sizes = {
            "TP": args.tensor_model_parallel_size,
            "CP": args.context_parallel_size,
            "EP": args.expert_model_parallel_size,
            "PP": args.pipeline_model_parallel_size,
            "VPP": args.virtual_pipeline_model_parallel_size or 1,
            "DP": args.data_parallel_size,
        }
        parts = [f"{name}{size}" for name, size in sizes.items() if size > 1]
        return " ".join(parts) or "one rank"

    @property
    def recomputation(self) -> str:
        """What is recomputed, in the flags' words."""
        if self.args.recompute_granularity == "selective":
            return " ".join(self.args.recompute_modules or ["core_attn"])
        return self.args.recompute_granularity or "nothing"

    @property
    def microbatches(self) -> int:
        """Of a step."""
        return pipeline_of(self.args).microbatches


def plan_layout(label: str, flags: Sequence[str], world_size: int, machine: Machine) -> Planned:
    """Plan the run that ``flags`` of pretraining describe, on so many GPUs.

    Raises
    ------
    UsageError
        For flags that are wrong, or that Megatron refuses at that size.
    """
    args, ranks = plan_ranks(without(flags, _WRITTEN), world_size)
    layout = Layout(args, machine.node)
    return Planned(
        label=label,
        args=args,
        machine=machine,
        needs=tuple(_need(args, rank, layout, machine.gpu) for rank in ranks),
        timing=timing(args, machine.gpu, machine.mfu, _layers(ranks)),
        checkpoint=_checkpoint(args, ranks, machine.disk),
    )


def _need(args: Namespace, rank: RankPlan, layout: Layout, gpu: Gpu) -> Need:
    communicators = len(layout.communicators(rank.rank))
    times = {"process": 1, "communicator": communicators, "share": rank.total}
    set_aside = {each.name: round(each.each * times[each.of]) for each in ALLOWANCES if times[each.of]}
    sent = _sent(args, rank, layout)
    return Need(rank, rank.memory | set_aside, tuple(of_rank(layout, rank.rank, sent, gpu)))


def _sent(args: Namespace, rank: RankPlan, layout: Layout) -> dict[str, dict[str, int]]:
    """Return what a rank sends in a step, by kind of group and collective."""
    microbatches = pipeline_of(args).microbatches
    sent = {
        kind: {name: count * microbatches for name, count in by_name.items()}
        for kind, by_name in in_model(rank.sent).items()
    }
    if args.transformer_impl != "local":  # whose attention has run
        sent["CP"] = of_context(args, sum(rank.layers))
    sent["PP"] = of_pipeline(args, rank.pipeline_stage)
    sent["embedding"] = of_embedding(args, rank.pipeline_stage)
    for kind, buffers in rank.buffers.items():
        group = {"dense": "DP", "expert": "expert DP"}[kind]
        ranks = len(layout.group(group, rank.rank).ranks)
        sent[group] = of_gradients(args, Buffers(*buffers), ranks)
    return sent


def _layers(ranks: Sequence[RankPlan]) -> list[tuple[int, ...]]:
    """Return the layers by stage and virtual stage, of one rank of each stage."""
    of_stage = {rank.pipeline_stage: rank.layers for rank in ranks}
    return [of_stage[stage] for stage in sorted(of_stage)]


def _checkpoint(args: Namespace, ranks: Sequence[RankPlan], disk: float) -> Checkpoint:
    parameters = _parameters(args, ranks)
    return Checkpoint(parameters, parameters * bytes_per_parameter(args), disk)


def _parameters(args: Namespace, ranks: Sequence[RankPlan]) -> int:
    """Return the whole model's parameters, each once."""
    copies = args.data_parallel_size * args.context_parallel_size
    tp = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    of_experts = args.world_size // (tp * args.expert_model_parallel_size * args.pipeline_model_parallel_size)
    whole = 0.0
    for rank in ranks:
        split = rank.parameters - rank.expert_parameters - rank.replicated_parameters
        alike = split / copies + rank.expert_parameters / of_experts
        alike += rank.replicated_parameters / (copies * args.tensor_model_parallel_size)
        whole += rank.ranks_alike * alike
    return round(whole)


def relabelled(planned: Planned, label: str) -> Planned:
    """Return it under another name."""
    return dataclasses.replace(planned, label=label)
