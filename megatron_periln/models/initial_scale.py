"""The initial weights of placements that scale them, as DeepNorm does (arXiv 2203.00555, figure 2)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_periln.errors import UsageError
from megatron_periln.norms import NormPlacement
from megatron_periln.norms.formulas import Place, evaluate

__all__ = ["scale_initial_weights", "with_plain_output_projections"]


def with_plain_output_projections(config: TransformerConfig, placement: NormPlacement) -> TransformerConfig:
    """Return the configuration in which output projections start as other weights do, where that is asked.

    Megatron starts them at ``1/sqrt(2 num_layers)`` of it.
    """
    if placement.initial_scale == 1.0:
        return config
    changed = copy.copy(config)
    changed.output_layer_init_method = config.init_method
    return changed


@torch.no_grad()
def scale_initial_weights(model: nn.Module, placement: NormPlacement) -> None:
    """Multiply what values, output projections and MLPs start with by the placement's ``initial_scale``.

    Parameters
    ----------
    model
        A built pipeline stage, whose weights no checkpoint has been loaded into yet.
    placement
        Its ``initial_scale`` goes by the number of layers alone.

    Raises
    ------
    UsageError
        If a layer's sublayers are other than attention and a dense MLP.
    """
    for name, layer in model.named_modules():
        if not (hasattr(layer, "self_attention") and hasattr(layer, "mlp")):
            continue
        scale = evaluate(placement.initial_scale, Place.of_layer(1, layer.config.num_layers, True))
        attention, mlp = layer.self_attention, layer.mlp
        try:
            weights = [attention.linear_proj.weight, mlp.linear_fc1.weight, mlp.linear_fc2.weight]
            weights.append(_values(attention))
        except AttributeError as error:
            raise UsageError(
                f"norm placement {placement.name!r}: its initial weights are those of attention and a dense "
                f"MLP, and {name} has other sublayers; choose another norm placement"
            ) from error
        for weight in weights:
            weight.mul_(scale)


def _values(attention: Any) -> torch.Tensor:
    """Return the rows of values in the weight of queries, keys and values, as a view."""
    heads, groups = attention.num_attention_heads_per_partition, attention.num_query_groups_per_partition
    size = attention.hidden_size_per_attention_head
    weight = attention.linear_qkv.weight
    if weight.shape[0] != (heads + 2 * groups) * size:
        raise AttributeError("linear_qkv")
    rows: torch.Tensor = weight.data.view(groups, -1, weight.shape[1])
    return rows[:, -size:]
