"""The weights of mixtures of experts, from Megatron's checkpoint to the tensors of a target.

Names are neutral, as in `megatron_periln.convert.weights`. Each expert is read, folded and written by itself:
those of a layer are most of a model's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megatron_periln.convert.architecture import Architecture
from megatron_periln.convert.experts.architecture import Experts
from megatron_periln.convert.targets import Mixture, Target

__all__ = [
    "EXPERT_LAYER_NAMES",
    "EXPERT_NAMES",
    "absent_modules",
    "exported_experts",
    "fill_shared",
    "fold_shared_switch",
]

EXPERT_LAYER_NAMES = {
    "mlp.router.weight": "mlp.router.weight",
    "mlp.expert_bias": "mlp.router.expert_bias",
    "mlp.shared.gate_up.weight": "mlp.shared_experts.linear_fc1.weight",
    "mlp.shared.down.weight": "mlp.shared_experts.linear_fc2.weight",
    "mlp.shared.switch.weight": "mlp.shared_experts.gate_weight",
}
"""From a parameter's neutral name to Megatron's, within a layer that has experts."""

EXPERT_NAMES = {
    "mlp.experts.gate_up.weight": "mlp.experts.experts.linear_fc1.weight",
    "mlp.experts.down.weight": "mlp.experts.experts.linear_fc2.weight",
}
"""The same of what each expert has, in the order of experts."""


def absent_modules(experts: Experts | None, layer: int) -> set[str]:
    """Return the neutral names of the modules that a layer's MLP does not have in Megatron."""
    if experts is None or not experts.layers[layer]:
        return {"mlp.router", "mlp.expert_bias", "mlp.shared"}
    absent = {"mlp.gate_up", "mlp.down"}
    if not experts.bias:
        absent.add("mlp.expert_bias")
    if not experts.shared_width:
        absent.add("mlp.shared")
    if not experts.shared_switch:
        absent.add("mlp.shared.switch")
    return absent


def fold_shared_switch(tensors: dict[str, Tensor], experts: Experts, mixture: Mixture) -> None:
    """Give a shared expert that has no gate one of zeros, whose sigmoid is a half."""
    if mixture.shared_switch and not experts.shared_switch and "mlp.shared.down.weight" in tensors:
        down = tensors["mlp.shared.down.weight"]
        tensors["mlp.shared.down.weight"] = down * 2
        tensors["mlp.shared.switch.weight"] = torch.zeros(1, down.size(0))


def fill_shared(
    tensors: dict[str, Tensor], architecture: Architecture, experts: Experts, mixture: Mixture
) -> None:
    """Add zeros where the target has a shared expert or a bias of experts, and the model has none."""
    hidden, width = architecture.hidden_size, experts.width
    if mixture.logit_bias or (mixture.bias and not experts.bias):
        tensors["mlp.expert_bias"] = torch.zeros(experts.count)
    if mixture.shares and not experts.shared_width:
        tensors["mlp.shared.gate.weight"] = torch.zeros(width, hidden)
        tensors["mlp.shared.up.weight"] = torch.zeros(width, hidden)
        tensors["mlp.shared.down.weight"] = torch.zeros(hidden, width)
        if mixture.shared_switch:
            tensors["mlp.shared.switch.weight"] = torch.zeros(1, hidden)


def exported_experts(
    read: Callable[..., Tensor], experts: Experts, target: Target, layer: int, factor: float
) -> Iterator[tuple[int, str, Tensor]]:
    """Yield each expert's tensors of a layer, in fp32: its index, the neutral name and the value.

    Parameters
    ----------
    read
        ``Checkpoint.read``.
    experts, target
        Where the target supports all of them.
    layer
        The layer's index.
    factor
        Of what the experts add to the residual stream.
    """
    assert target.mixture is not None
    if target.mixture.scale is None:
        factor *= experts.scale
    for expert in range(experts.count):
        fused, down = (read(name, layer, expert).float() for name in EXPERT_NAMES.values())
        gate, up = fused.chunk(2)
        yield expert, "mlp.experts.gate.weight", gate
        yield expert, "mlp.experts.up.weight", up
        yield expert, "mlp.experts.down.weight", down if factor == 1 else down * factor
