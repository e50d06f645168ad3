"""What Megatron's local layers (``--transformer-impl local``) lack for some configurations.

Upstream's local spec refuses sequence parallelism, zero-centered gamma and an fp32 residual stream
in its norms (``WrappedTorchNorm``, megatron/core/transformer/torch_norm.py), and context
parallelism and multi-latent attention in its attention (``DotProductAttention``,
megatron/core/transformer/dot_product_attention.py), which also forgets any mask it is given where
there is a window; and norms of queries that latent attention does not compress. Where a configuration
asks for one of these, and only there, the spec gets the modules below instead.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_periln.models.attention_masks import fold_masks
from megatron_periln.models.query_norm import LocalLatentAttention, norms_whole_queries
from megatron_periln.models.specs import substitute
from megatron_periln.norms import InputNorm

__all__ = ["LocalAttention", "complete_local_spec"]


_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal, AttnMaskType.causal_bottom_right)


class LocalAttention(DotProductAttention):
    """Plain attention for context parallelism, for windows, and for value heads of their own size.

    The causal mask, the window and the documents of ``--reset-attention-mask`` are one mask here.
    Upstream's softmax (``FusedScaleMaskSoftmax``) puts a square mask of the window in the place of any
    that it is given, and its fused kernels have a causal mask in them and read no other.

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
        accepted.masked_softmax_fusion = False
        super().__init__(accepted, *args, pg_collection=pg_collection, **kwargs)
        self.config = config
        # None in a layer that --window-attn-skip-freq leaves without one.
        self.window, self.scale_mask_softmax.window_size = self.scale_mask_softmax.window_size, None
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
        ``attention_mask``, True where masked, is ``[batch, 1, sequence / cp, sequence]``, or None;
        what the causal mask and the window hide is hidden in any case.
        Returns ``[sequence / cp, batch, hidden / tp]``.
        """
        if self.cp_group is None:
            # The last ones of the keys', which include earlier tokens' where inference keeps them.
            own = torch.arange(key.size(0), device=key.device)[-query.size(0) :]
        else:
            positions = self._positions(key.size(0), key.device)
            own = positions[self.cp_group.rank()]
            key, value = (self._gather(tensor, positions) for tensor in (key, value))
        causal = self.attn_mask_type in _CAUSAL
        mask = fold_masks(attention_mask, own, key.size(0), causal=causal, window=self.window)
        return super().forward(query, key, value, mask, *args, **kwargs)

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
    if config.context_parallel_size > 1 or config.multi_latent_attention or config.window_size is not None:
        table[DotProductAttention] = LocalAttention
    if config.transformer_impl == "local" and norms_whole_queries(config):
        table[MLASelfAttention] = LocalLatentAttention
    if config.attention_backend == AttnBackend.local:
        table[TEDotProductAttention] = table.get(DotProductAttention, DotProductAttention)
    return substitute(spec, table) if table else spec
