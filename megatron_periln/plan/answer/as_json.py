"""A plan as data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_periln.plan.answer.fit import Remedy
from megatron_periln.plan.answer.planned import Need, Planned
from megatron_periln.plan.costs.communication import Traffic

__all__ = ["as_data"]


def as_data(planned: Planned, remedies: Sequence[Remedy] = ()) -> dict[str, Any]:
    """Return a plan as numbers, strings, lists and dicts; bytes, seconds and FLOP."""
    timing, gpu = planned.timing, planned.machine.gpu
    return {
        "label": planned.label,
        "fits": planned.fits,
        "layout": planned.layout,
        "placement": planned.args.norm_placement,
        "world_size": planned.args.world_size,
        "gpu": {"name": gpu.name, "memory": gpu.memory, "source": gpu.source, "node": planned.machine.node},
        "ranks": [_rank(need) for need in planned.needs],
        "step": {
            "tokens": timing.tokens,
            "flop": timing.flops,
            "recomputed": timing.recomputed,
            "bubble": timing.bubble,
            "ideal_bubble": timing.ideal_bubble,
            "microbatches": planned.microbatches,
            "mfu": timing.mfu,
            "seconds": timing.step_seconds,
        },
        "run": {"steps": timing.steps, "days": timing.days},
        "checkpoint": {
            "parameters": planned.checkpoint.parameters,
            "bytes": planned.checkpoint.bytes,
            "seconds": planned.checkpoint.seconds,
        },
        "changes": [
            {
                "flags": list(remedy.flags),
                "bytes": remedy.planned.fullest.bytes,
                "step_time": remedy.step_time,
            }
            for remedy in remedies
        ],
    }


def _rank(need: Need) -> dict[str, Any]:
    rank = need.rank
    return {
        "name": rank.name,
        "rank": rank.rank,
        "ranks_alike": rank.ranks_alike,
        "pipeline_stage": rank.pipeline_stage,
        "parameters": rank.parameters,
        "memory": need.memory,
        "bytes": need.bytes,
        "microbatches_in_flight": list(rank.microbatches_in_flight),
        "sent": [_traffic(traffic) for traffic in need.traffic],
    }


def _traffic(traffic: Traffic) -> dict[str, Any]:
    return {
        "group": traffic.group.kind,
        "ranks": len(traffic.group.ranks),
        "links": traffic.group.links,
        "bytes": traffic.sent,
        "over_network": traffic.over_network,
        "seconds": traffic.seconds,
    }
