"""What Megatron's local layers (``--transformer-impl local``) lack for some configurations.

Upstream's local spec refuses sequence parallelism, zero-centered gamma and an fp32 residual stream
in its norms (``WrappedTorchNorm``, megatron/core/transformer/torch_norm.py), and context
parallelism and multi-latent attention in its attention (``DotProductAttention``,
megatron/core/transformer/dot_product_attention.py). Where a configuration asks for one of these,
and only there, the spec gets the modules below instead.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_periln.models.specs import substitute
from megatron_periln.norms import InputNorm

__all__ = ["LocalAttention", "complete_local_spec"]


class LocalAttention(DotProductAttention):
    """Plain attention for context parallelism and for value heads of their own size.

    With context parallelism each rank holds two chunks of the sequence, ``r`` and
    ``2 * size - 1 - r`` (``get_batch_on_this_cp_rank``). Keys and values are gathered over the
    group and put in order; in the backward pass their gradients are summed and scattered.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        pg_collection: ProcessGroupCollection,
        k_channels: int | None = None,
        v_channels: int | None = None,
        **kwargs: Any,
    ) -> None:
        accepted = copy.copy(config)
        accepted.context_parallel_size = 1
        super().__init__(accepted, *args, pg_collection=pg_collection, **kwargs)
        self.config = config
        self.cp_group = pg_collection.cp if config.context_parallel_size > 1 else None
        if v_channels is not None:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Attend from this rank's positions to the whole sequence.

        ``query``, ``key`` and ``value`` are ``[sequence / cp, batch, heads, channels]``;
        ``attention_mask``, True where masked, is ``[batch, 1, sequence / cp, sequence]``, or None
        for the causal mask. Returns ``[sequence / cp, batch, hidden / tp]``.
        """
        if self.cp_group is not None:
            positions = self._positions(key.size(0), key.device)
            key, value = (self._gather(tensor, positions) for tensor in (key, value))
            if attention_mask is None:
                own = positions[self.cp_group.rank()]
                attention_mask = torch.arange(positions.numel(), device=own.device) > own[:, None]
        return super().forward(query, key, value, attention_mask, *args, **kwargs)

    def _positions(self, local_length: int, device: torch.device) -> Tensor:
        """Return the positions that each rank holds, ``[cp, sequence / cp]``."""
        assert self.cp_group is not None
        size = self.cp_group.size()
        chunks = torch.arange(size * local_length, device=device).view(2 * size, local_length // 2)
        return torch.cat([chunks[:size], chunks.flip(0)[:size]], dim=1)

    def _gather(self, tensor: Tensor, positions: Tensor) -> Tensor:
        gathered = gather_from_sequence_parallel_region(
            tensor.contiguous(), tensor_parallel_output_grad=True, group=self.cp_group
        )
        return gathered[positions.flatten().argsort()]


def complete_local_spec(spec: Any, config: TransformerConfig) -> Any:
    """Return ``spec`` with upstream's local modules replaced where ``config`` asks too much of them.

    ``--attention-backend local`` is honoured here, for every kind of spec; upstream's builder
    honours it for dense layers only.
    """
    table: dict[Any, Any] = {}
    if config.sequence_parallel or config.layernorm_zero_centered_gamma or config.fp32_residual_connection:
        table[WrappedTorchNorm] = InputNorm
    if config.context_parallel_size > 1 or config.multi_latent_attention:
        table[DotProductAttention] = LocalAttention
    if config.attention_backend == AttnBackend.local:
        table[TEDotProductAttention] = table.get(DotProductAttention, DotProductAttention)
    return substitute(spec, table) if table else spec
