"""What order a pipeline's stages compute in, as Megatron's schedules have it, and how long they wait."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal, NamedTuple

from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

__all__ = ["Piece", "Pipeline", "bubble", "order"]

_BACKWARD = 2.0  # of a forward: a product for each of two operands


class Piece(NamedTuple):
    """One microbatch's way through one chunk of a stage."""

    way: Literal["forward", "backward"]
    microbatch: int
    chunk: int


@dataclass(frozen=True)
class Pipeline:
    """A pipeline of a job.

    Attributes
    ----------
    stages
        Ranks of it.
    microbatches
        Of a step.
    chunks
        Model chunks of a rank; 1 without interleaving.
    group
        ``--microbatch-group-size-per-virtual-pipeline-stage``: microbatches in a row in a chunk.
    overlaps_experts
        Whether ``--overlap-moe-expert-parallel-comm`` is on, which warms up with one more.
    """

    stages: int
    microbatches: int
    chunks: int = 1
    group: int | None = None
    overlaps_experts: bool = False

    @property
    def ideal_bubble(self) -> float:
        """The share of a step that a rank waits if all chunks take equally long (Narayanan et al., 2021)."""
        return (self.stages - 1) / (self.chunks * self.microbatches + self.stages - 1)


def order(pipeline: Pipeline, stage: int) -> list[Piece]:
    """Return what a rank of a pipeline computes, in order.

    By Megatron's ``get_pp_rank_microbatches`` and ``get_schedule_table``: 1F1B, or interleaved 1F1B.
    """
    interleaved = pipeline.chunks > 1
    communicator = SimpleNamespace(
        pp_group=SimpleNamespace(size=lambda: pipeline.stages, rank=lambda: stage),
        virtual_pipeline_model_parallel_size=pipeline.chunks if interleaved else None,
    )
    group = pipeline.group or pipeline.stages
    total, _, warmup, _ = get_pp_rank_microbatches(
        pipeline.microbatches,
        pipeline.chunks,
        group,
        overlap_moe_expert_parallel_comm=pipeline.overlaps_experts,
        p2p_communicator=communicator,
    )
    table = get_schedule_table(pipeline.microbatches, pipeline.chunks, group)
    forward = [Piece("forward", microbatch, chunk) for microbatch, chunk in table]
    backward = [Piece("backward", microbatch, pipeline.chunks - 1 - chunk) for microbatch, chunk in table]
    steady = [piece for pair in zip(forward[warmup:], backward, strict=False) for piece in pair]
    return [*forward[:warmup], *steady, *backward[total - warmup :]]


def _before(piece: Piece, stage: int, pipeline: Pipeline) -> tuple[int, Piece] | None:
    """Return the piece, and its stage, whose output a piece needs."""
    way, microbatch, chunk = piece
    last = pipeline.stages - 1
    if way == "forward":
        if stage:
            return stage - 1, piece
        return (last, Piece(way, microbatch, chunk - 1)) if chunk else None
    if stage < last:
        return stage + 1, piece
    if chunk < pipeline.chunks - 1:
        return 0, Piece(way, microbatch, chunk + 1)
    return last, Piece("forward", microbatch, chunk)


def bubble(pipeline: Pipeline, costs: Sequence[Sequence[float]] | None = None) -> float:
    """Return the share of a step that the ranks wait, by running the schedule.

    Parameters
    ----------
    pipeline
        Its shape.
    costs
        How long a forward takes, by stage and chunk, in any unit; all alike if None. A backward takes twice
        as long. Sending takes no time.
    """
    costs = costs or [[1.0] * pipeline.chunks] * pipeline.stages
    todo = [order(pipeline, stage) for stage in range(pipeline.stages)]
    ends: dict[tuple[int, Piece], float] = {}
    clocks, places = [0.0] * pipeline.stages, [0] * pipeline.stages
    waiting = list(range(pipeline.stages))
    while waiting:
        moved = False
        for stage in waiting:
            while places[stage] < len(todo[stage]):
                piece = todo[stage][places[stage]]
                needed = _before(piece, stage, pipeline)
                if needed is not None and needed not in ends:
                    break
                start = max(clocks[stage], ends[needed] if needed else 0.0)
                cost = costs[stage][piece.chunk] * (_BACKWARD if piece.way == "backward" else 1.0)
                clocks[stage] = ends[stage, piece] = start + cost
                places[stage] += 1
                moved = True
        waiting = [stage for stage in waiting if places[stage] < len(todo[stage])]
        if waiting and not moved:
            raise ValueError(f"{pipeline}: its stages would wait for each other forever")
    busy = (1 + _BACKWARD) * pipeline.microbatches * sum(sum(chunks) for chunks in costs)
    return max(0.0, 1 - busy / (pipeline.stages * max(clocks)))  # not -2e-16
