"""What an exported model has no place for, multiplied into its weights, in fp32.

The functions that take ``tensors`` change a layer's tensors, by role, in place.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_periln.convert.architecture import Architecture
from megatron_periln.convert.layout import interleave, separate
from megatron_periln.convert.targets import Target

__all__ = [
    "fill_biases",
    "fold_output_eps",
    "full_gain",
    "normalized_table",
    "order_rotary_pairs",
    "scale_attention",
    "scaled",
]

_ROWS = 1 << 14  # of a table that are widened to fp32 at a time


def scaled(tensor: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """Return ``tensor * factor`` in ``dtype``."""
    if factor == 1:
        return tensor.to(dtype)
    result = torch.empty_like(tensor, dtype=dtype)
    for start in range(0, len(tensor), _ROWS):
        result[start : start + _ROWS] = tensor[start : start + _ROWS].float() * factor
    return result


def normalized_table(table: Tensor, gain: Tensor, architecture: Architecture, dtype: torch.dtype) -> Tensor:
    """Return the embedding table with the embedding's scale and norm.

    Both act on each token's row by itself, so they can act on the table.
    """
    result = torch.empty_like(table, dtype=dtype)
    for start in range(0, len(table), _ROWS):
        rows = table[start : start + _ROWS].float() * architecture.embedding_scale
        result[start : start + _ROWS] = F.rms_norm(rows, gain.shape, gain, architecture.eps)
    return result


def full_gain(stored: Tensor, architecture: Architecture) -> Tensor:
    """Return the factors of a norm, which are 1 more than stored with zero-centered gamma."""
    return stored.float() + 1 if architecture.zero_centered_gamma else stored.float()


def order_rotary_pairs(tensors: dict[str, Tensor], architecture: Architecture, target: Target) -> None:
    """Put the channels of queries and keys, and of their norms, in the target's order."""
    if architecture.rope.interleaved == target.interleaved:
        return
    reorder = interleave if target.interleaved else separate
    for role in tensors:
        if role.startswith(("attention.q.", "attention.k.", "attention.q_norm.", "attention.k_norm.")):
            tensors[role] = reorder(tensors[role], architecture)


def scale_attention(tensors: dict[str, Tensor], architecture: Architecture) -> None:
    """Scale the queries, or the gain of their norm, instead of the attention scores."""
    if architecture.attention_scale == 1:
        return
    normed = ["attention.q_norm.weight"]
    for role in normed if architecture.qk_norm else ["attention.q.weight", "attention.q.bias"]:
        if role in tensors:
            tensors[role] = tensors[role] * architecture.attention_scale


def fold_output_eps(tensors: dict[str, Tensor], architecture: Architecture) -> None:
    """Give the output norms the model's epsilon, by scaling what they norm.

    ``c * y / sqrt(mean((c * y)**2) + eps)`` is ``y / sqrt(mean(y**2) + eps / c**2)``.
    """
    if not architecture.placement.output or architecture.output_eps == architecture.eps:
        return
    factor = (architecture.eps / architecture.output_eps) ** 0.5
    for role in ("attention.proj.weight", "attention.proj.bias", "mlp.down.weight", "mlp.down.bias"):
        if role in tensors:
            tensors[role] = tensors[role] * factor


def fill_biases(tensors: dict[str, Tensor], architecture: Architecture, target: Target) -> None:
    """Add a bias of zeros after attention, where the target has it together with the queries'."""
    for switched in target.bias_switches.values():
        if switched & architecture.biases and "proj" in switched - architecture.biases:
            tensors["attention.proj.bias"] = torch.zeros(architecture.hidden_size)
