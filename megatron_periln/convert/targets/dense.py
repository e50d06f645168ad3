"""Targets for dense models.

What each computes was read from its modeling file in transformers 5.23; tests/convert compares it
with Megatron's.
"""

from __future__ import annotations

from megatron_periln.convert.targets.names import (
    ATTENTION_NAMES,
    GLOBAL_NAMES,
    LAYER,
    MLP_NAMES,
    PRE_NAMES,
    QK_NORM_NAMES,
)
from megatron_periln.convert.targets.target import Target

__all__ = ["DENSE"]

_ATTENTION = frozenset({"qkv", "proj"})
_MLP = frozenset({"mlp"})

_OUTPUT_NAMES = {
    **GLOBAL_NAMES,
    **ATTENTION_NAMES,
    **QK_NORM_NAMES,
    "attention.output_norm": LAYER + "post_attention_layernorm",
    **MLP_NAMES,
    "mlp.output_norm": LAYER + "post_feedforward_layernorm",
}

DENSE: tuple[Target, ...] = (
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
            **GLOBAL_NAMES,
            **ATTENTION_NAMES,
            "attention.input_norm": LAYER + "input_layernorm",
            "attention.output_norm": LAYER + "post_self_attn_layernorm",
            "mlp.input_norm": LAYER + "post_attention_layernorm",
            "mlp.gate_up": LAYER + "mlp.gate_up_proj",
            "mlp.down": LAYER + "mlp.down_proj",
            "mlp.output_norm": LAYER + "post_mlp_layernorm",
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
            **PRE_NAMES,
            "attention.output_norm": LAYER + "post_norm1",
            "mlp.output_norm": LAYER + "post_norm2",
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
            **ATTENTION_NAMES,
            **QK_NORM_NAMES,
            "embedding": "model.embed_tokens",
            "final_norm": "model.embedding_norm",
            "head": "lm_head",
            "attention.input_norm": LAYER + "operator_norm",
            "attention.output_norm": LAYER + "post_operator_norm",
            "mlp.input_norm": LAYER + "ffn_norm",
            "mlp.gate": LAYER + "feed_forward.w1",
            "mlp.up": LAYER + "feed_forward.w3",
            "mlp.down": LAYER + "feed_forward.w2",
            "mlp.output_norm": LAYER + "post_ffn_norm",
        },
        settings={"use_sandwich_norm": True, "use_attention_gate": False, "sliding_window": None},
        layer_settings={"layer_types": "full_attention"},
        rope_labels=("full_attention",),
        eps_name="norm_eps",
    ),
    Target(
        name="llama",
        architecture="LlamaForCausalLM",
        runs_in="transformers, vLLM, SGLang and llama.cpp",
        placement="pre",
        bias_switches={"attention_bias": _ATTENTION, "mlp_bias": _MLP},
        divided_heads=True,
        names=PRE_NAMES,
    ),
    Target(
        name="qwen3",
        architecture="Qwen3ForCausalLM",
        runs_in="transformers, vLLM, SGLang and llama.cpp",
        placement="pre",
        qk_norm=True,
        bias_switches={"attention_bias": _ATTENTION},
        names={**PRE_NAMES, **QK_NORM_NAMES},
        settings={"use_sliding_window": False, "sliding_window": None},
        num_layers_settings=("max_window_layers",),
        layer_settings={"layer_types": "full_attention"},
    ),
    Target(
        name="exaone4",
        architecture="Exaone4ForCausalLM",
        runs_in="transformers, vLLM, SGLang and, if its heads are of the hidden size together, without "
        "windows, llama.cpp",
        placement="output",
        qk_norm=True,
        names=_OUTPUT_NAMES,
        layer_kinds="rotates in windows, if there are",
        window_period="sliding_window_pattern",
    ),
    Target(
        name="olmo2",
        architecture="Olmo2ForCausalLM",
        runs_in="transformers, vLLM, SGLang and llama.cpp",
        placement="output",
        qk_norm=True,
        whole_qk_norm=True,
        whole_heads=True,
        names=_OUTPUT_NAMES,
        settings={"attention_bias": False},
    ),
    Target(
        name="olmo3",
        architecture="Olmo3ForCausalLM",
        runs_in="transformers, vLLM, SGLang and llama.cpp",
        placement="output",
        qk_norm=True,
        whole_qk_norm=True,
        whole_heads=True,
        layer_kinds="rotates everywhere",
        names=_OUTPUT_NAMES,
        settings={"attention_bias": False},
        rope_labels=("sliding_attention", "full_attention"),
    ),
    Target(
        name="minimax",
        architecture="MiniMaxForCausalLM",
        runs_in="transformers and vLLM",
        placement="post",
        embedding_norm=True,
        names={
            **ATTENTION_NAMES,
            "embedding": "model.embed_tokens",
            "embedding_norm": "model.layers.0.input_layernorm",
            "head": "lm_head",
            # The residual stream starts behind each norm: a norm after the add opens the next sublayer.
            "attention.output_norm": LAYER + "post_attention_layernorm",
            "mlp.gate": LAYER + "block_sparse_moe.experts.0.w1",
            "mlp.up": LAYER + "block_sparse_moe.experts.0.w3",
            "mlp.down": LAYER + "block_sparse_moe.experts.0.w2",
            "mlp.output_norm": "model.layers.{next}.input_layernorm",
            "last.mlp.output_norm": "model.norm",
        },
        in_memory={"block_sparse_moe": "mlp"},
        zeros={LAYER + "block_sparse_moe.gate.weight": 1},
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
