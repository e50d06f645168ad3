"""The architectures of transformers that a model can be exported to, as data.

What each computes was read from its modeling file in transformers 5.23; tests/convert compares it
with Megatron's. Adding one is adding a value to `TARGETS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["TARGETS", "Target"]

_NONE: frozenset[str] = frozenset()
_ATTENTION = frozenset({"qkv", "proj"})
_MLP = frozenset({"mlp"})

_LAYER = "model.layers.{layer}."
_ATTENTION_NAMES = {
    "attention.q": _LAYER + "self_attn.q_proj",
    "attention.k": _LAYER + "self_attn.k_proj",
    "attention.v": _LAYER + "self_attn.v_proj",
    "attention.proj": _LAYER + "self_attn.o_proj",
}
_QK_NORM_NAMES = {
    "attention.q_norm": _LAYER + "self_attn.q_norm",
    "attention.k_norm": _LAYER + "self_attn.k_norm",
}
_GLOBAL_NAMES = {"embedding": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}
_PRE_NAMES = {
    **_GLOBAL_NAMES,
    **_ATTENTION_NAMES,
    "attention.input_norm": _LAYER + "input_layernorm",
    "mlp.input_norm": _LAYER + "post_attention_layernorm",
    "mlp.gate": _LAYER + "mlp.gate_proj",
    "mlp.up": _LAYER + "mlp.up_proj",
    "mlp.down": _LAYER + "mlp.down_proj",
}


@dataclass(frozen=True, kw_only=True)
class Target:
    """An architecture of transformers: what it can express, its configuration, its tensors' names.

    Parameters
    ----------
    name
        The value of ``--target``; also ``model_type`` in the configuration.
    architecture
        The class in transformers.
    runs_in
        Where it runs without code of its own.
    placement
        The norm placement that it computes.
    qk_norm
        It norms each head's queries and keys.
    bias_switches
        Settings of the configuration, and the biases that each switches on.
    interleaved
        Its rotary pairs are neighbours.
    partial_rotary
        A share of each head's channels may rotate.
    divided_heads
        The hidden size must be divisible by the number of heads.
    embedding_norm
        It has an embedding norm, and needs one. Without it, the norm is folded into the table.
    names
        From the neutral name of a module (see ``weights``) to the architecture's; ``{layer}`` stands for
        the layer's index, ``{next}`` for that of the layer after it. A neutral name that starts with
        ``last.`` is that of the last layer.
    zeros
        Tensors of zeros beside: names, and their rows of ``hidden_size``.
    settings
        Further settings of the configuration.
    num_layers_settings
        Those whose value is the number of layers.
    layer_settings
        Settings that are a list with one value a layer.
    rope_label
        The key under which the configuration nests its rotary parameters, if it does.
    eps_name
        The setting that holds the norms' epsilon.
    multipliers
        Settings that scale what the model computes, and the attribute of `Architecture` that each is.
    no_eos
        The value of ``eos_token_id`` for none: null, but where the configuration takes null for ids of its
        own.
    """

    name: str
    architecture: str
    runs_in: str
    placement: str
    qk_norm: bool = False
    bias_switches: Mapping[str, frozenset[str]] = field(default_factory=dict)
    interleaved: bool = False
    partial_rotary: bool = False
    divided_heads: bool = False
    embedding_norm: bool = False
    names: Mapping[str, str]
    zeros: Mapping[str, int] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    num_layers_settings: tuple[str, ...] = ()
    layer_settings: Mapping[str, Any] = field(default_factory=dict)
    rope_label: str | None = None
    eps_name: str = "rms_norm_eps"
    multipliers: Mapping[str, str] = field(default_factory=dict)
    no_eos: list[int] | None = None

    @property
    def biases(self) -> frozenset[str]:
        """The biases that it can have."""
        return _NONE.union(*self.bias_switches.values())

    def tensor_name(self, parameter: str, layer: int = 0, num_layers: int = 0) -> str:
        """Return the name of a parameter's tensor, such as that of ``attention.q.weight`` in layer 3."""
        module, _, kind = parameter.rpartition(".")
        if layer == num_layers - 1:
            module = f"last.{module}" if f"last.{module}" in self.names else module
        return f"{self.names[module].format(layer=layer, next=layer + 1)}.{kind}"


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="glm4",
            architecture="Glm4ForCausalLM",
            runs_in="transformers, vLLM, SGLang and llama.cpp",
            placement="peri",
            bias_switches={"attention_bias": frozenset({"qkv"})},
            interleaved=True,
            partial_rotary=True,
            no_eos=[],
            names={
                **_GLOBAL_NAMES,
                **_ATTENTION_NAMES,
                "attention.input_norm": _LAYER + "input_layernorm",
                "attention.output_norm": _LAYER + "post_self_attn_layernorm",
                "mlp.input_norm": _LAYER + "post_attention_layernorm",
                "mlp.gate_up": _LAYER + "mlp.gate_up_proj",
                "mlp.down": _LAYER + "mlp.down_proj",
                "mlp.output_norm": _LAYER + "post_mlp_layernorm",
            },
        ),
        Target(
            name="hyperclovax",
            architecture="HyperCLOVAXForCausalLM",
            runs_in="transformers from 5.9 and vLLM",
            placement="peri",
            bias_switches={"attention_bias": _ATTENTION, "mlp_bias": _MLP},
            divided_heads=True,
            names={
                **_PRE_NAMES,
                "attention.output_norm": _LAYER + "post_norm1",
                "mlp.output_norm": _LAYER + "post_norm2",
            },
            settings={"use_post_norm": True},
            multipliers={
                "attention_multiplier": "attention_scale",
                "embedding_multiplier": "embedding_scale",
                "logits_scaling": "logit_scale",
                "residual_multiplier": "residual_scale",
            },
        ),
        Target(
            name="lfm3",
            architecture="Lfm3ForCausalLM",
            runs_in="transformers from 5.23",
            placement="peri",
            qk_norm=True,
            bias_switches={"attention_bias": _ATTENTION},
            names={
                **_ATTENTION_NAMES,
                **_QK_NORM_NAMES,
                "embedding": "model.embed_tokens",
                "final_norm": "model.embedding_norm",
                "head": "lm_head",
                "attention.input_norm": _LAYER + "operator_norm",
                "attention.output_norm": _LAYER + "post_operator_norm",
                "mlp.input_norm": _LAYER + "ffn_norm",
                "mlp.gate": _LAYER + "feed_forward.w1",
                "mlp.up": _LAYER + "feed_forward.w3",
                "mlp.down": _LAYER + "feed_forward.w2",
                "mlp.output_norm": _LAYER + "post_ffn_norm",
            },
            settings={"use_sandwich_norm": True, "use_attention_gate": False, "sliding_window": None},
            layer_settings={"layer_types": "full_attention"},
            rope_label="full_attention",
            eps_name="norm_eps",
        ),
        Target(
            name="llama",
            architecture="LlamaForCausalLM",
            runs_in="transformers, vLLM, SGLang and llama.cpp",
            placement="pre",
            bias_switches={"attention_bias": _ATTENTION, "mlp_bias": _MLP},
            divided_heads=True,
            names=_PRE_NAMES,
        ),
        Target(
            name="qwen3",
            architecture="Qwen3ForCausalLM",
            runs_in="transformers, vLLM, SGLang and llama.cpp",
            placement="pre",
            qk_norm=True,
            bias_switches={"attention_bias": _ATTENTION},
            names={**_PRE_NAMES, **_QK_NORM_NAMES},
            settings={"use_sliding_window": False, "sliding_window": None},
            num_layers_settings=("max_window_layers",),
            layer_settings={"layer_types": "full_attention"},
        ),
        Target(
            name="exaone4",
            architecture="Exaone4ForCausalLM",
            runs_in="transformers, vLLM, SGLang and, if its heads are of the hidden size together, llama.cpp",
            placement="output",
            qk_norm=True,
            names={
                **_GLOBAL_NAMES,
                **_ATTENTION_NAMES,
                **_QK_NORM_NAMES,
                "attention.output_norm": _LAYER + "post_attention_layernorm",
                "mlp.gate": _LAYER + "mlp.gate_proj",
                "mlp.up": _LAYER + "mlp.up_proj",
                "mlp.down": _LAYER + "mlp.down_proj",
                "mlp.output_norm": _LAYER + "post_feedforward_layernorm",
            },
            settings={"sliding_window": None, "sliding_window_pattern": None},
            layer_settings={"layer_types": "full_attention"},
        ),
        Target(
            name="minimax",
            architecture="MiniMaxForCausalLM",
            runs_in="transformers",
            placement="post",
            embedding_norm=True,
            names={
                **_ATTENTION_NAMES,
                "embedding": "model.embed_tokens",
                "embedding_norm": "model.layers.0.input_layernorm",
                "head": "lm_head",
                # The residual stream starts behind each norm: a norm after the add opens the next sublayer.
                "attention.output_norm": _LAYER + "post_attention_layernorm",
                "mlp.gate": _LAYER + "block_sparse_moe.experts.0.w1",
                "mlp.up": _LAYER + "block_sparse_moe.experts.0.w3",
                "mlp.down": _LAYER + "block_sparse_moe.experts.0.w2",
                "mlp.output_norm": "model.layers.{next}.input_layernorm",
                "last.mlp.output_norm": "model.norm",
            },
            zeros={_LAYER + "block_sparse_moe.gate.weight": 1},
            settings={
                "num_local_experts": 1,
                "num_experts_per_tok": 1,
                "sliding_window": None,
                "postnorm": True,  # where it is read, the default is a stream that starts before each norm
                # Factors of the residual stream and of what is added to it.
                "full_attn_alpha_factor": 1,
                "full_attn_beta_factor": 1,
                "mlp_alpha_factor": 1,
                "mlp_beta_factor": 1,
            },
            layer_settings={"layer_types": "full_attention"},
        ),
    )
}
"""By name, the first of several that fit being the one to choose."""
