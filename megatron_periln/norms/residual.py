"""The norms that stand in Megatron's bias-dropout-add slots.

``TransformerLayer`` builds ``submodules.self_attn_bda`` and ``submodules.mlp_bda`` and calls them
as ``bda(training, fused)((branch, bias), residual, dropout)``
(megatron/core/transformer/transformer_layer.py). A module in that slot owns its norm's parameters,
which Megatron then shards, checkpoints, reduces and optimizes like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_periln.norms import kernels
from megatron_periln.norms.modules import JoinedNorm, SlotNorm
from megatron_periln.norms.placement import NormPlacement

__all__ = ["AddNorm", "OutputNormAdd", "ResidualNorm"]

BranchWithBias = tuple[Tensor, Tensor | None]
BiasDropoutAdd = Callable[[BranchWithBias, Tensor, float], Tensor]


class ResidualNorm(nn.Module):
    """A norm that takes the place of Megatron's ``get_bias_dropout_add``.

    Parameters
    ----------
    norm
        Whose parameters, epsilon and gamma convention are used.
    """

    def __init__(self, norm: SlotNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, training: bool, fused: bool) -> BiasDropoutAdd:
        """Return the function that joins a branch with the residual stream.

        ``fused`` is Megatron's ``bias_dropout_fusion``; the kernels choose their own backend.
        """
        return partial(self.join, training=training)

    def join(
        self, branch_with_bias: BranchWithBias, residual: Tensor, dropout: float, *, training: bool
    ) -> Tensor:
        """Join ``branch`` and ``residual``, both ``[sequence, batch, hidden]``."""
        raise NotImplementedError


class OutputNormAdd(ResidualNorm):
    """``residual + dropout(norm(branch + bias))``: the output norm of Peri-LN and output-only.

    Attributes
    ----------
    following
        The norm of the sum that follows in the same layer, to be computed along with it; none by default.
        It is a module of the layer's, not of this one.
    """

    def __init__(self, config: TransformerConfig, placement: NormPlacement) -> None:
        # A hybrid model counts each sublayer as a layer.
        depth = config.num_layers / 2 if config.is_hybrid_model else config.num_layers
        super().__init__(
            SlotNorm(
                config,
                eps=placement.output_norm_epsilon,
                initial_gain=placement.initial_output_gain(depth),
                trainable=not placement.freeze_output_norm,
            )
        )
        self.following: tuple[JoinedNorm] | None = None

    def join(
        self, branch_with_bias: BranchWithBias, residual: Tensor, dropout: float, *, training: bool
    ) -> Tensor:
        """Normalize the branch, bias included, then add it to the residual stream."""
        branch, bias = branch_with_bias

        def compute(*parameters: Any) -> Tensor:
            arguments = (branch, bias, residual, *parameters, dropout, training)
            if self.following is None:
                return kernels.norm_add(*arguments)
            return self.following[0](branch, sum_of=arguments)

        return self.norm(branch, compute)


class AddNorm(ResidualNorm):
    """``norm(residual + dropout(branch + bias))``: Post-LN."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(SlotNorm(config))

    def join(
        self, branch_with_bias: BranchWithBias, residual: Tensor, dropout: float, *, training: bool
    ) -> Tensor:
        """Add the branch, bias included, to the residual stream, then normalize the sum."""
        branch, bias = branch_with_bias
        return self.norm(
            branch,
            lambda *parameters: kernels.add_norm(branch, bias, residual, *parameters, dropout, training),
        )
