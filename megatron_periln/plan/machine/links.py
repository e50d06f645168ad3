"""Which ranks speak with each other, and over what: from Megatron's own order of ranks."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from functools import cached_property

from megatron.core.parallel_state import RankGenerator

__all__ = ["Group", "Layout"]


@dataclass(frozen=True)
class Group:
    """A communication group of Megatron's.

    Attributes
    ----------
    kind
        ``"TP"``, ``"PP"``, ``"CP"``, ``"DP"``, ``"EP"``, ``"expert TP"``, ``"expert TP and EP"``,
        ``"expert DP"`` or ``"embedding"``, of the first and the last stage.
    ranks
        Its ranks, in order.
    node
        How many ranks share a node: one after the other, as launchers number them.
    """

    kind: str
    ranks: tuple[int, ...]
    node: int

    def on_node_of(self, rank: int) -> int:
        """Return how many of the group are on a rank's node, itself included."""
        return sum(other // self.node == rank // self.node for other in self.ranks)

    @property
    def links(self) -> str:
        """``"NVLink"`` if all are on one node, ``"network"`` if no two are, or ``"both"``."""
        largest = max(self.on_node_of(rank) for rank in self.ranks)
        if largest == len(self.ranks):
            return "NVLink"
        return "network" if largest == 1 else "both"


@dataclass(frozen=True)
class Layout:
    """The groups of a job, by Megatron's ``RankGenerator``, as ``initialize_model_parallel`` has them.

    Attributes
    ----------
    args
        Megatron's arguments, validated.
    node
        Ranks of a node.
    """

    args: Namespace
    node: int

    @property
    def _order(self) -> str:
        # initialize.py:_initialize_distributed
        return "tp-cp-ep-pp-dp" if self.args.use_tp_pp_dp_mapping else "tp-cp-ep-dp-pp"

    @cached_property
    def dense(self) -> RankGenerator:
        """The ranks of all but experts."""
        args = self.args
        tp, pp, cp = (
            args.tensor_model_parallel_size,
            args.pipeline_model_parallel_size,
            args.context_parallel_size,
        )
        return RankGenerator(
            tp=tp, ep=1, dp=args.world_size // (tp * pp * cp), pp=pp, cp=cp, order=self._order
        )

    @cached_property
    def expert(self) -> RankGenerator:
        """The ranks of experts."""
        args = self.args
        pp, ep = args.pipeline_model_parallel_size, args.expert_model_parallel_size
        tp = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
        return RankGenerator(
            tp=tp, ep=ep, dp=args.world_size // (tp * pp * ep), pp=pp, cp=1, order=self._order
        )

    def group(self, kind: str, rank: int) -> Group:
        """Return a rank's group of a kind."""
        if kind == "embedding":
            pipeline = self.group("PP", rank).ranks
            return Group(kind, (pipeline[0], pipeline[-1]), self.node)
        generator, token = {
            "TP": (self.dense, "tp"),
            "PP": (self.dense, "pp"),
            "CP": (self.dense, "cp"),
            "DP": (self.dense, "dp-cp"),
            "EP": (self.expert, "ep"),
            "expert TP": (self.expert, "tp"),
            "expert TP and EP": (self.expert, "tp-ep"),
            "expert DP": (self.expert, "dp"),
        }[kind]
        found = next(ranks for ranks in generator.get_ranks(token) if rank in ranks)
        return Group(kind, tuple(found), self.node)

    def communicators(self, rank: int) -> list[Group]:
        """Return the groups of several ranks that a rank speaks in."""
        kinds = ["TP", "PP", "CP", "DP"]
        if self.args.num_experts:
            kinds += ["EP", "expert TP", "expert DP"]
        groups = [self.group(kind, rank) for kind in kinds]
        unique = {group.ranks: group for group in reversed(groups) if len(group.ranks) > 1}
        return [group for group in groups if unique.get(group.ranks) is group]
