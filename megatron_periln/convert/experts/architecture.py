"""What a model's mixtures of experts compute, as far as an exported model must reproduce it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Experts"]


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The mixtures of experts of a model, alike in all layers that have one.

    Parameters
    ----------
    layers
        Which layers have one instead of a dense MLP.
    count, chosen
        Experts of a layer, and how many of them each token goes to.
    width
        Hidden size of an expert.
    score
        ``"softmax"`` over all experts, or each expert's ``"sigmoid"``.
    normalized
        The chosen experts' scores are divided by their sum.
    bias
        A bias takes part in the choice, and not in the scores.
    groups
        The number of groups of experts, and from how many of them a token chooses: those with the largest
        sums of their two best scores. None for a choice from all.
    scale
        Factor of the scores.
    shared_width
        Hidden size of the expert that all tokens go to; 0 for none.
    shared_switch
        Its output is multiplied with the sigmoid of a projection of the input.
    """

    layers: tuple[bool, ...]
    count: int
    chosen: int
    width: int
    score: str
    normalized: bool
    bias: bool = False
    groups: tuple[int, int] | None = None
    scale: float = 1.0
    shared_width: int = 0
    shared_switch: bool = False

    @property
    def first_dense(self) -> int | None:
        """How many layers at the start are dense; None if others are too."""
        dense = self.layers.index(True)
        return dense if all(self.layers[dense:]) else None

    @property
    def dense_layers(self) -> list[int]:
        """The layers that are dense."""
        return [layer for layer, sparse in enumerate(self.layers) if not sparse]

    @staticmethod
    def of(core: Any) -> Experts | None:
        """Return the experts that Megatron's ``TransformerConfig`` says, None if it has none."""
        if core.num_moe_experts is None:
            return None
        layers = sparse_layers(core.moe_layer_freq, core.num_layers)
        if not any(layers):
            return None
        sigmoid = core.moe_router_score_function != "softmax"
        grouped = core.moe_router_group_topk and core.moe_router_num_groups != core.moe_router_group_topk
        return Experts(
            layers=layers,
            count=core.num_moe_experts,
            chosen=core.moe_router_topk,
            width=core.moe_ffn_hidden_size,
            score=core.moe_router_score_function,
            normalized=core.moe_router_topk > 1 if sigmoid else not core.moe_router_pre_softmax,
            bias=core.moe_router_enable_expert_bias,
            groups=(core.moe_router_num_groups, core.moe_router_group_topk) if grouped else None,
            scale=core.moe_router_topk_scaling_factor or 1.0,
            shared_width=core.moe_shared_expert_intermediate_size or 0,
            shared_switch=bool(core.moe_shared_expert_intermediate_size and core.moe_shared_expert_gate),
        )


def sparse_layers(frequency: int | Sequence[int], count: int) -> tuple[bool, ...]:
    """Return which layers have experts, by Megatron's ``--moe-layer-freq``."""
    if isinstance(frequency, int):
        return tuple(layer % frequency == 0 for layer in range(count))
    return tuple(bool(sparse) for sparse in frequency)
