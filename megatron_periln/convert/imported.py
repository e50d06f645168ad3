"""The tensors of a model of transformers in Megatron's layout, with its multipliers folded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from megatron_periln.convert.architecture import Architecture
from megatron_periln.convert.layout import join_qkv
from megatron_periln.convert.targets import Target

__all__ = ["imported_tensor", "without_scales"]

Get = Callable[[str], Tensor]


def without_scales(architecture: Architecture) -> Architecture:
    """Return the architecture after `imported_tensor` has folded every multiplier."""
    return replace(
        architecture, embedding_scale=1.0, logit_scale=1.0, attention_scale=1.0, residual_scale=1.0
    )


def imported_tensor(get: Get, architecture: Architecture, target: Target, role: str, layer: int) -> Tensor:
    """Return one tensor in Megatron's layout.

    Parameters
    ----------
    get
        Returns the tensor of a name in the source.
    architecture, target
        Those of the source.
    role
        As in ``GLOBAL_NAMES`` and ``LAYER_NAMES``.
    layer
        The layer's index; 0 for what stands outside the layers.
    """

    def part(name: str) -> Tensor:
        return get(target.tensor_name(name, layer, architecture.num_layers))

    module, _, kind = role.rpartition(".")
    if module == "attention.qkv":
        q, k, v = (part(f"attention.{name}.{kind}") for name in "qkv")
        scale = 1.0 if architecture.qk_norm else architecture.attention_scale
        return join_qkv(_times(q, scale), k, v, architecture)
    if module == "mlp.gate_up" and module not in target.names:
        return torch.cat([part(f"mlp.gate.{kind}"), part(f"mlp.up.{kind}")])
    return _times(part(role), _factor(architecture, module))


def _factor(architecture: Architecture, module: str) -> float:
    """Return what a tensor is multiplied with, so that the model needs no multipliers."""
    logits = architecture.logit_scale
    scales = {
        "embedding": architecture.embedding_scale,
        "attention.q_norm": architecture.attention_scale,
        # A tied output layer has the embedding's scale, so the final norm takes both.
        "final_norm": logits / architecture.embedding_scale if architecture.tied else 1.0,
        "head": logits,
    }
    ends = ("output_norm",) if architecture.placement.output else ("proj", "down")
    scales |= {
        f"{sublayer}.{end}": architecture.residual_scale for sublayer in ("attention", "mlp") for end in ends
    }
    return scales.get(module, 1.0)


def _times(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1 else (tensor.float() * factor).to(tensor.dtype)
