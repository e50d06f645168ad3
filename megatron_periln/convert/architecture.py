"""What a model computes, as far as an exported model must reproduce it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_periln.convert.experts.architecture import Experts
from megatron_periln.convert.layer_kinds import LayerKinds
from megatron_periln.convert.rope_scaling import RopeScaling
from megatron_periln.models import GPTModelConfig
from megatron_periln.norms import MODELS, NORM_KINDS, NormPlacement, NormSettings

__all__ = ["Architecture", "Rope"]


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding.

    Parameters
    ----------
    theta
        Base of the frequencies.
    fraction
        Share of each head's channels that rotate.
    interleaved
        Channel pairs are neighbours; otherwise they are half the rotated channels apart.
    scaling
        How its frequencies are scaled, if they are.
    """

    theta: float
    fraction: float = 1.0
    interleaved: bool = False
    scaling: RopeScaling | None = None


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A GPT with RMSNorm, RoPE and SwiGLU; what differs between such models.

    Parameters
    ----------
    experts
        Its mixtures of experts; None for a dense model.
    kinds
        What differs from layer to layer in attention; None for nothing.
    whole_qk_norm
        The norms of queries and keys are over all heads together.
    attention_gate
        A gate of each channel, by the sigmoid of a projection, multiplies what attention gives.
    biases
        The linears that have one: ``"qkv"``, ``"proj"`` (of attention), ``"mlp"`` (both).
    tied
        The output layer is the embedding table.
    embedding_scale, logit_scale
        Factors of the embedding and of the logits.
    attention_scale
        Factor of the attention scores beside ``head_dim ** -0.5``.
    residual_scale
        Factor of what each sublayer adds to the residual stream. Megatron has none.
    """

    placement: NormPlacement
    eps: float
    zero_centered_gamma: bool = False
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rope: Rope
    experts: Experts | None = None
    kinds: LayerKinds | None = None
    attention_gate: bool = False
    qk_norm: bool = False
    whole_qk_norm: bool = False
    biases: frozenset[str] = frozenset()
    tied: bool = False
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    attention_scale: float = 1.0
    residual_scale: float = 1.0

    @property
    def output_eps(self) -> float:
        """Epsilon of the output norms."""
        return self.placement.settings_of("output").epsilon or self.eps

    def settings_of(self, norm: str) -> NormSettings:
        """Return what a norm has of its own, by its neutral name, such as ``attention.input_norm``."""
        kind = norm.rpartition(".")[2].removesuffix("_norm")
        if kind == "output" and not self.placement.output:
            kind = "after_add"  # which the targets call by the same name
        return self.placement.settings_of(kind) if kind in NORM_KINDS else MODELS  # of queries and keys

    @property
    def rotary_dim(self) -> int:
        """Channels of each head that rotate."""
        return int(self.head_dim * self.rope.fraction)

    @staticmethod
    def of(config: GPTModelConfig) -> Architecture:
        """Return the architecture of a model of Megatron's for which `unsupported_by_all` finds nothing."""
        core = config.transformer
        standard_scale = core.kv_channels**-0.5
        return Architecture(
            placement=config.norm_placement,
            eps=core.layernorm_epsilon,
            zero_centered_gamma=core.layernorm_zero_centered_gamma,
            num_layers=core.num_layers,
            hidden_size=core.hidden_size,
            ffn_hidden_size=core.ffn_hidden_size,
            num_heads=core.num_attention_heads,
            num_kv_heads=core.num_query_groups or core.num_attention_heads,
            head_dim=core.kv_channels,
            vocab_size=config.vocab_size,
            max_positions=config.seq_length,
            rope=Rope(
                theta=config.rotary_base,
                # Megatron's YaRN rotates all of a head, whatever --rotary-percent says.
                fraction=1.0 if config.position_embedding_type == "yarn" else config.rotary_percent,
                interleaved=core.rotary_interleaved,
                scaling=RopeScaling.of_config(config),
            ),
            experts=Experts.of(core),
            kinds=LayerKinds.of(core).or_none(),
            attention_gate=core.attention_output_gate,
            qk_norm=core.qk_layernorm,
            whole_qk_norm=config.whole_qk_norm,
            biases=_biases(core),
            tied=config.share_embeddings_and_output_weights,
            embedding_scale=core.mup_embedding_mult if core.use_mup else 1.0,
            logit_scale=core.mup_output_mult if core.use_mup else 1.0,
            attention_scale=(core.softmax_scale or standard_scale) / standard_scale,
        )


def _biases(core: Any) -> frozenset[str]:
    if core.add_bias_linear:
        return frozenset({"qkv", "proj", "mlp"})
    return frozenset({"qkv"}) if core.add_qkv_bias else frozenset()
