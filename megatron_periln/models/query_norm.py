"""The norm of queries that latent attention does not compress, with Megatron's local layers.

Without ``--q-lora-rank``, ``--qk-layernorm`` norms what queries are projected from. Transformer Engine does
that inside their projection (``QKNormConfigResolver``, megatron/core/transformer/mla_qk_norm_config.py);
upstream's local layers have no such projection, and refuse.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mla_qk_norm_config import QKNormConfigResolver
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_periln.norms import InputNorm, kernels

__all__ = ["LocalLatentAttention", "NormedColumnParallelLinear", "norms_whole_queries"]


def norms_whole_queries(config: TransformerConfig) -> bool:
    """Tell whether latent attention norms what its queries are projected from, whole."""
    latent = config.multi_latent_attention and config.experimental_attention_variant is None
    return latent and config.qk_layernorm and config.q_lora_rank is None


class NormedColumnParallelLinear(ColumnParallelLinear):
    """A linear behind a norm, with the names that the parameters of Transformer Engine's have.

    Attributes
    ----------
    layer_norm_weight, layer_norm_bias
        ``[input_size]``; the bias is None for RMSNorm.
    """

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, **options: Any
    ) -> None:
        super().__init__(input_size, output_size, config=config, **options)
        norm = InputNorm(config, input_size)
        self.register_parameter("layer_norm_weight", norm.weight)
        self.register_parameter("layer_norm_bias", norm.bias)

    def forward(self, input_: Tensor, *arguments: Any, **options: Any) -> Any:
        """Project the norm of ``input_``, ``[sequence, batch, input_size]``."""
        normed = kernels.norm(
            input_,
            self.layer_norm_weight,
            self.layer_norm_bias,
            self.config.layernorm_epsilon,
            self.config.layernorm_zero_centered_gamma,
            self.layer_norm_weight.dtype,
        )
        return super().forward(normed, *arguments, **options)


class LocalLatentAttention(MLASelfAttention):
    """Upstream's latent attention, its queries projected by a `NormedColumnParallelLinear`."""

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
        projected = replace(submodules, linear_q_proj=NormedColumnParallelLinear, q_layernorm=IdentityOp)
        resolver = QKNormConfigResolver(self.config, projected)
        resolver.fused_norm_linear_impl = NormedColumnParallelLinear
        return resolver.resolve()
