"""Gradients that Megatron gets wrong under tensor parallelism: of parameters that its ranks share."""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.ssm.gated_delta_net.common import _GDNBase
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor, nn

from megatron_periln.patches.registry import changes

__all__ = ["fix_delta_nets", "fix_latent_attention"]


@changes(
    "megatron.core.transformer.multi_latent_attention.MLASelfAttention.linear_kv_down_proj",
    "megatron.core.distributed.finalize_model_grads.average_gradients_across_tp_domain",
    why="with Megatron's own linears and several tensor-parallel ranks two gradients are wrong. The "
    "positional key is shared by all heads, of which each rank has some: its gradient is not "
    "summed over the ranks. The query norm sees whole vectors on every rank, unless sequence "
    "parallelism splits the tokens: its gradient, equal on all ranks, is summed all the same, "
    "because of the parameter's name",
    until="parallel/test_faults.py::test_upstream_still_has_wrong_gradients_in_latent_attention",
)
def fix_latent_attention(model: nn.Module) -> None:
    """Fix the gradients of every multi-latent attention in ``model``; others are left alone."""
    for attention in model.modules():
        if not isinstance(attention, MLASelfAttention) or attention.tp_group.size() == 1:
            continue
        down_projection = getattr(attention, "linear_kv_down_proj", None)
        if isinstance(down_projection, ColumnParallelLinear):
            down_projection.register_forward_hook(_Widen(attention))
        query_norm = getattr(attention, "q_layernorm", None)
        if query_norm is not None and not attention.config.sequence_parallel:
            for parameter in query_norm.parameters():
                parameter.average_gradients_across_tp_domain = True


@changes(
    "megatron.core.ssm.gated_delta_net.common._GDNBase.out_norm",
    why="each tensor-parallel rank of a gated delta net norms its own heads with one weight, which all have. "
    "Its gradient is summed over the ranks with sequence parallelism alone; without, each rank goes on with "
    "a weight of its own",
    until="parallel/test_faults.py::test_upstream_still_has_wrong_gradients_in_gated_delta_nets",
)
def fix_delta_nets(model: nn.Module) -> None:
    """Sum the gradients of every gated delta net's output norm over the ranks that have its heads."""
    for net in model.modules():
        if isinstance(net, _GDNBase) and net.tp_size > 1 and not net.config.sequence_parallel:
            for parameter in net.out_norm.parameters():
                parameter.register_hook(functools.partial(_summed, group=net.tp_group))


def _summed(gradient: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    gradient = gradient.contiguous().clone()
    torch.distributed.all_reduce(gradient, group=group)
    return gradient


class _Widen:
    """Returns the down projection whole, as a linear that is not split returns it.

    Upstream then takes its path for such linears, on which the positional key is gathered over
    the sequence with a gradient that is summed. Without sequence parallelism it sums none, so
    this does.
    """

    def __init__(self, attention: MLASelfAttention) -> None:
        self.config, self.group = attention.config, attention.tp_group

    def __call__(self, linear: nn.Module, inputs: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        combined, bias = output
        combined = gather_from_tensor_model_parallel_region(combined, group=self.group)
        if self.config.sequence_parallel:
            return scatter_to_sequence_parallel_region(combined, group=self.group), bias
        sizes = [self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim]
        compressed, positional = torch.split(combined, sizes, dim=-1)
        positional = copy_to_tensor_model_parallel_region(positional, group=self.group)
        return torch.cat([compressed, positional], dim=-1), bias
