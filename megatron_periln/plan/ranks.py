"""What each kind of rank of a run holds in its GPU's memory."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_periln.plan.costs.collectives import Sent

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
    raise NotImplementedError
