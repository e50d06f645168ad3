"""Norms of queries and of keys over all heads together, as OLMo 2 has them.

Megatron's ``--qk-layernorm`` norms each head by itself. With tensor parallelism a rank has some of the heads:
the mean of squares is summed over ranks. The weight is whole on every rank, which uses its heads' part of it:
Megatron sums the gradients of these norms over tensor-parallel ranks
(``_allreduce_non_tensor_model_parallel_grads``, megatron/core/distributed/finalize_model_grads.py), and saves
them as it does each head's.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

__all__ = ["WholeNorm", "norm_whole_queries"]


class WholeNorm(nn.Module):
    """RMSNorm over all heads together.

    Parameters
    ----------
    config
        Gives the dtype of the weight, and whether 1 is added to it.
    hidden_size
        Channels of a head.
    eps
        Added to the mean of squares.
    heads
        Of all tensor-parallel ranks.

    Attributes
    ----------
    weight
        ``[heads * hidden_size]``, on every rank.
    """

    def __init__(self, *, config: TransformerConfig, hidden_size: int, eps: float, heads: int) -> None:
        super().__init__()
        self.eps, self.zero_centered = eps, config.layernorm_zero_centered_gamma
        start = torch.zeros if self.zero_centered else torch.ones
        self.weight = nn.Parameter(start(heads * hidden_size, dtype=config.params_dtype))

    def forward(self, heads: Tensor) -> Tensor:
        """Norm ``[sequence, batch, heads of this rank, channels]``."""
        count, channels = heads.shape[-2:]
        weight = self.weight.float() + 1 if self.zero_centered else self.weight.float()
        values = heads.float()
        squares = values.square().sum((-2, -1), keepdim=True)
        if count * channels < weight.numel():
            rank = parallel_state.get_tensor_model_parallel_rank()
            weight = weight[rank * count * channels : (rank + 1) * count * channels]
            squares = _SumOverRanks.apply(squares)
        normed = values * torch.rsqrt(squares / self.weight.numel() + self.eps)
        return (normed * weight.view(count, channels)).to(heads.dtype)


class _SumOverRanks(torch.autograd.Function):
    """A sum over tensor-parallel ranks that each of them reads: its gradient is the sum of theirs."""

    @staticmethod
    def forward(_: Any, tensor: Tensor) -> Tensor:
        return _summed(tensor)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return _summed(gradient)


def _summed(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    torch.distributed.all_reduce(tensor, group=parallel_state.get_tensor_model_parallel_group())
    return tensor


def norm_whole_queries(submodules: SelfAttentionSubmodules, config: TransformerConfig) -> Any:
    """Return the submodules of attention with norms over all heads.

    Raises
    ------
    ValueError
        If ranks share keys: then none has its own part of them.
    """
    groups = config.num_query_groups or config.num_attention_heads
    if groups < config.tensor_model_parallel_size:
        raise ValueError(
            f"--whole-qk-norm needs at least as many --num-query-groups ({groups}) as "
            f"--tensor-model-parallel-size ({config.tensor_model_parallel_size})"
        )
    return replace(
        submodules,
        q_layernorm=functools.partial(WholeNorm, heads=config.num_attention_heads),
        k_layernorm=functools.partial(WholeNorm, heads=groups),
    )
