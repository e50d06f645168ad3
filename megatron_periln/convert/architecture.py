"""What a model computes, as far as an exported model must reproduce it."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from megatron_periln.models import GPTModelConfig
from megatron_periln.norms import NormPlacement

__all__ = ["Architecture", "Misfit", "Rope", "obstacles"]


@dataclass(frozen=True)
class Misfit:
    """Something that an exported model can't express.

    Parameters
    ----------
    reason
        What the model has, as a clause.
    change
        What to train with instead.
    """

    reason: str
    change: str


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
    llama3
        Frequencies are scaled as in Llama 3.1 (``--use-rope-scaling``).
    """

    theta: float
    fraction: float = 1.0
    interleaved: bool = False
    llama3: bool = False


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A dense GPT with RMSNorm, RoPE and SwiGLU; what differs between such models.

    Parameters
    ----------
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
    qk_norm: bool = False
    biases: frozenset[str] = frozenset()
    tied: bool = False
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    attention_scale: float = 1.0
    residual_scale: float = 1.0

    @property
    def output_eps(self) -> float:
        """Epsilon of the output norms."""
        return self.placement.output_norm_epsilon or self.eps

    @property
    def rotary_dim(self) -> int:
        """Channels of each head that rotate."""
        return int(self.head_dim * self.rope.fraction)

    @staticmethod
    def of(config: GPTModelConfig) -> Architecture:
        """Return the architecture of a model without `obstacles`."""
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
                fraction=config.rotary_percent,
                interleaved=core.rotary_interleaved,
                llama3=config.rope_scaling,
            ),
            qk_norm=core.qk_layernorm,
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


# Megatron's argument, its value in every model that can be exported, what another value means, and
# what to train with.
_REQUIRED: tuple[tuple[str, Any, str, str], ...] = (
    ("hybrid_layer_pattern", None, "it is a hybrid model", "a GPT, without --hybrid-layer-pattern"),
    ("multi_latent_attention", False, "it has multi-latent attention", "--group-query-attention"),
    ("num_experts", None, "it has experts", "a dense model, without --num-experts"),
    ("spec", None, "its layers come from --spec", "Megatron's own layers, without --spec"),
    (
        "heterogeneous_layers_config_path",
        None,
        "its layers differ",
        "equal layers, without --heterogeneous-layers-config-path",
    ),
    ("experimental_attention_variant", None, "it has another attention", "--group-query-attention"),
    ("normalization", "RMSNorm", "its norms are LayerNorms", "--normalization RMSNorm"),
    ("swiglu", True, "its MLP is not SwiGLU", "--swiglu"),
    ("glu_linear_offset", 0.0, "its MLP adds --glu-linear-offset", "--glu-linear-offset 0"),
    ("activation_func_clamp_value", None, "its MLP is clamped", "no --activation-func-clamp-value"),
    ("position_embedding_type", "rope", "its positions are not rotary", "--position-embedding-type rope"),
    ("no_rope_freq", None, "some of its layers have no positions", "no --no-rope-freq"),
    ("rotary_seq_len_interpolation_factor", None, "its positions are interpolated", "--use-rope-scaling"),
    ("window_size", None, "its attention has a window", "no --window-size"),
    ("softmax_type", "vanilla", "its softmax has a sink", "--softmax-type vanilla"),
    ("attention_output_gate", False, "its attention is gated", "no --attention-output-gate"),
    ("qk_l2_norm", False, "its queries and keys have L2 norms", "--qk-layernorm"),
    (
        "apply_residual_connection_post_layernorm",
        False,
        "its residual stream starts after the norm",
        "no --apply-residual-connection-post-layernorm",
    ),
)


def obstacles(args: Namespace) -> list[Misfit]:
    """Return what no exported model can express of the model that Megatron's saved ``args`` describe."""
    return [
        Misfit(reason, change)
        for name, value, reason, change in _REQUIRED
        if getattr(args, name, value) != value
    ]
