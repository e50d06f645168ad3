"""The guard against silent Pre-LN: each residual add of a built model has the norm that its placement asks.

A layer that adds to the residual stream by itself would train as Pre-LN, and say nothing. That is not left to
a list of flags: the model that was built is looked at, and after its first forward pass what was called.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from torch import nn

from megatron_periln.errors import UsageError
from megatron_periln.norms import (
    NormedBiasDropoutAdd,
    NormPlacement,
    OutputNorm,
    PlainAdd,
    PostNorm,
    SublayerRule,
)
from megatron_periln.norms.formulas import Place

__all__ = ["SLOTS", "check_calls", "check_slots", "rule_of"]

SLOTS = {
    "self_attn_bda": "self_attention",
    "cross_attn_bda": "cross_attention",
    "mlp_bda": "mlp",
    "mamba_bda": "mixer",
}
"""The bias-dropout-adds of Megatron's layers, and the sublayer whose output each adds, by attribute."""

_seen_to_call: WeakSet[nn.Module] = WeakSet()


def rule_of(layer: Any, slot: str, placement: NormPlacement) -> SublayerRule:
    """Return the rule of a built layer's sublayer, by the number that Megatron has given the layer.

    Parameters
    ----------
    layer
        One of Megatron's; layers of multi-token prediction are counted by themselves.
    slot
        Its bias-dropout-add, a key of `SLOTS`.
    placement
        The model's.
    """
    config = layer.config
    number, attention = getattr(layer, "layer_number", 1), slot != "mlp_bda"
    return placement.at(Place.of_layer(number, config.num_layers, attention, config.is_hybrid_model))


def check_slots(model: nn.Module, placement: NormPlacement) -> None:
    """Check that a built pipeline stage has the norm of ``placement`` at every residual add.

    Raises
    ------
    UsageError
        If a layer has no such place, or something else in it; the message names the first of them.
    """
    if placement.adds_plainly:
        return
    for name, reason in _faults(model, placement):
        raise UsageError(
            f"norm placement {placement.name!r}: {name} {reason}, and would train as Pre-LN does; choose "
            "other layers (--spec, --hybrid-layer-pattern, --experimental-attention-variant), or pre"
        )


def check_calls(model: nn.Module) -> None:
    """Check, once for each model, that a forward pass called every bias-dropout-add that has a norm.

    Raises
    ------
    UsageError
        If one was not called: its layer added to the residual stream in another way.
    """
    if model in _seen_to_call:
        return
    _seen_to_call.add(model)
    for name, module in model.named_modules():
        if isinstance(module, NormedBiasDropoutAdd) and not module.called:
            raise UsageError(
                f"{name.removeprefix('module.')}: its layer's forward pass does not call it, and adds "
                "without the norm; choose other layers, or --norm-placement pre"
            )


def _faults(model: nn.Module, placement: NormPlacement) -> Iterator[tuple[str, str]]:
    """Yield the name of each layer without its norms, and what is wrong with it."""
    stacked = {id(layer) for stack in model.modules() for layer in getattr(stack, "layers", None) or ()}
    for name, layer in model.named_modules():
        slots = [slot for slot in SLOTS if hasattr(layer, slot)]
        kind = type(layer).__name__
        if id(layer) in stacked and not slots and not _is_container(layer):
            yield name, f"({kind}) has no bias-dropout-add in which its norm could stand"
        for slot in slots:
            if _is_nothing(getattr(layer, SLOTS[slot], None)):
                continue
            bda, rule = getattr(layer, slot), rule_of(layer, slot, placement)
            if rule.adds_plainly and not isinstance(bda, NormedBiasDropoutAdd):
                continue
            if not isinstance(bda, NormedBiasDropoutAdd) or type(bda.norm) is not _norm_class(rule):
                yield name, f"({kind}) adds the output of its {SLOTS[slot]} without the norm"
            elif not rule.learned and not _has_scales(bda.norm, rule):
                yield name, f"({kind}) adds the output of its {SLOTS[slot]} with other scales"


def _has_scales(norm: Any, rule: SublayerRule) -> bool:
    scales: tuple[float, float] = (norm.residual_scale, norm.output_scale)
    return scales == (rule.residual_scale, rule.output_scale)


def _norm_class(rule: SublayerRule) -> type[nn.Module]:
    if rule.output:
        return OutputNorm
    return PostNorm if rule.after_add else PlainAdd


def _is_container(layer: nn.Module) -> bool:
    """Tell whether it adds nothing itself, but holds layers that do: one of multi-token prediction."""
    return any(hasattr(module, slot) for module in layer.modules() for slot in SLOTS)


def _is_nothing(sublayer: object) -> bool:
    return sublayer is None or isinstance(sublayer, IdentityOp | IdentityFuncOp)
