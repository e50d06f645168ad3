"""What of a model's mixtures of experts a target doesn't support, each with what to train with instead."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from megatron_periln.convert.experts.architecture import Experts
from megatron_periln.convert.targets import Mixture, Target

__all__ = ["unsupported_by_all_mixtures", "unsupported_experts"]

# Megatron's argument, its value in every mixture that can be exported, what another value means, and what to
# train with.
_REQUIRED: tuple[tuple[str, Any, str, str], ...] = (
    ("add_bias_linear", False, "its experts have biases", "--disable-bias-linear"),
    ("moe_latent_size", None, "its experts work in a latent space", "no --moe-latent-size"),
    ("moe_apply_probs_on_input", False, "its experts' inputs are scaled", "no --moe-apply-probs-on-input"),
    (
        "moe_shared_expert_glu_interleave_size",
        None,
        "the rows of its shared expert's weights are interleaved",
        "no --moe-shared-expert-glu-interleave-size",
    ),
    (
        "moe_router_force_load_balancing",
        False,
        "its router is random",
        "no --moe-router-force-load-balancing",
    ),
    ("moe_router_force_biased", None, "its router is random", "no --moe-router-force-biased"),
)

_BALANCINGS = ("sinkhorn", "quantile_balancing")
"""Kinds of ``--moe-router-load-balancing-type`` that change what a router computes."""


def unsupported_by_all_mixtures(args: Namespace) -> Iterator[tuple[str, str]]:
    """Yield what no target supports of the experts that Megatron's saved ``args`` have: reason, change."""
    if getattr(args, "num_experts", None) is None:
        return
    for name, value, reason, change in _REQUIRED:
        if getattr(args, name, value) != value:
            yield reason, change
    kinds = getattr(args, "moe_router_load_balancing_type", "aux_loss")
    for kind in [kinds] if isinstance(kinds, str) else kinds:
        if kind in _BALANCINGS:
            yield f"its router is balanced by {kind}", "--moe-router-load-balancing-type aux_loss"


def unsupported_experts(target: Target, experts: Experts | None) -> Iterator[tuple[str, str]]:
    """Yield what ``target`` doesn't support of ``experts``: the reason, and what to train with instead."""
    mixture, name = target.mixture, target.name
    if experts is None:
        if mixture is not None:
            yield f"it has no experts, and {name} has", "--num-experts"
        return
    if mixture is None:
        yield f"it has experts, and {name} has none", "no --num-experts"
        return
    yield from _unsupported_layers(target, mixture, experts)
    yield from _unsupported_router(name, mixture, experts)
    yield from _unsupported_shared(name, mixture, experts)


def _unsupported_layers(target: Target, mixture: Mixture, experts: Experts) -> Iterator[tuple[str, str]]:
    if all(experts.layers):
        return
    if "mlp.down" not in target.names:
        yield f"some of its layers are dense, and {target.name} has experts in all", "no --moe-layer-freq"
    elif mixture.dense_layers is None and experts.first_dense is None:
        yield (
            f"dense layers stand between those with experts, and {target.name} has them at the start",
            "another --moe-layer-freq",
        )


def _unsupported_router(name: str, mixture: Mixture, experts: Experts) -> Iterator[tuple[str, str]]:
    if experts.score != mixture.score:
        yield (
            f"its router's scores are {experts.score} and {name}'s are {mixture.score}",
            f"--moe-router-score-function {mixture.score}",
        )
    elif mixture.normalized is True and not experts.normalized:
        change = "no --moe-router-pre-softmax" if experts.score == "softmax" else "--moe-router-topk 2"
        yield f"its chosen experts' scores do not add up to 1, and {name}'s do", change
    if experts.bias and not mixture.bias:
        yield (
            f"its router has a bias of experts, and {name} has none that does the same",
            "no --moe-router-enable-expert-bias",
        )
    if experts.groups is None:
        return
    if mixture.groups is None:
        yield f"its router chooses groups of experts, and {name}'s does not", "no --moe-router-group-topk"
    elif experts.chosen // experts.groups[1] != 2:
        yield (
            f"its router chooses groups by the best {experts.chosen // experts.groups[1]} of each, and "
            f"{name}'s by the best 2",
            f"--moe-router-group-topk {max(1, experts.chosen // 2)}",
        )


def _unsupported_shared(name: str, mixture: Mixture, experts: Experts) -> Iterator[tuple[str, str]]:
    if not experts.shared_width:
        return
    if not mixture.shares:
        yield f"it has a shared expert, and {name} has none", "no --moe-shared-expert-intermediate-size"
        return
    if experts.shared_switch and not mixture.shared_switch:
        yield f"its shared expert has a gate, and {name}'s has none", "no --moe-shared-expert-gate"
    if mixture.shared_count is not None and experts.shared_width % experts.width:
        yield (
            f"its shared expert is not a multiple of {experts.width} wide, and {name}'s is",
            f"--moe-shared-expert-intermediate-size {experts.width}",
        )
