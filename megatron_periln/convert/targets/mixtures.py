"""Targets for models with mixtures of experts.

What each computes was read from its modeling file in transformers 5.23; tests/convert compares it
with Megatron's. In memory transformers 5 has the weights of a layer's experts as one tensor; in files each
expert has its own, as in transformers 4. What was written as it is in memory is read by
`megatron_periln.convert.source.memory_names`.
"""

from __future__ import annotations

from megatron_periln.convert.targets.names import (
    ATTENTION_NAMES,
    EXPERT_NAMES,
    GLOBAL_NAMES,
    LAYER,
    PRE_NAMES,
    QK_NORM_NAMES,
)
from megatron_periln.convert.targets.target import Mixture, Target

__all__ = ["MIXTURES"]

_ATTENTION = frozenset({"qkv", "proj"})
_SHARED_NAMES = {
    "mlp.shared.gate": LAYER + "mlp.shared_experts.gate_proj",
    "mlp.shared.up": LAYER + "mlp.shared_experts.up_proj",
    "mlp.shared.down": LAYER + "mlp.shared_experts.down_proj",
}
_EVERY_LAYER = {"decoder_sparse_step": 1}  # of those that mlp_only_layers does not name

MIXTURES: tuple[Target, ...] = (
    Target(
        name="afmoe",
        architecture="AfmoeForCausalLM",
        runs_in="transformers 5, vLLM and, if every fourth layer alone has no window, llama.cpp",
        placement="peri",
        qk_norm=True,
        gate=True,
        layer_kinds="rotates in windows",
        window_period="global_attn_every_n_layers",
        mixture=Mixture(
            score="sigmoid",
            count="num_experts",
            bias=True,
            scale="route_scale",
            shared_count="num_shared_experts",
            first_dense="num_dense_layers",
        ),
        names={
            **PRE_NAMES,
            **QK_NORM_NAMES,
            **EXPERT_NAMES,
            **_SHARED_NAMES,
            "attention.gate": LAYER + "self_attn.gate_proj",
            "attention.output_norm": LAYER + "post_attention_layernorm",
            "mlp.input_norm": LAYER + "pre_mlp_layernorm",
            "mlp.router": LAYER + "mlp.router.gate",
            "mlp.expert_bias": LAYER + "mlp.expert_bias",
            "mlp.output_norm": LAYER + "post_mlp_layernorm",
        },
        # Beside transformers' own: what vLLM reads, which has no biases in attention.
        settings={
            "attention_bias": False,
            "score_func": "sigmoid",
            "route_norm": True,
            "n_group": 1,
            "topk_group": 1,
        },
        root_scale="mup_enabled",
    ),
    Target(
        name="kolibri1",
        architecture="Kolibri1ForCausalLM",
        runs_in="transformers from 5.23",
        placement="peri",
        qk_norm=True,
        layer_kinds="rotates in windows",
        mixture=Mixture(
            score="sigmoid",
            count="num_experts",
            normalized="norm_topk_prob",
            logit_bias=True,
            shared_width="shared_expert_intermediate_size",
        ),
        names={
            **GLOBAL_NAMES,
            **ATTENTION_NAMES,
            **QK_NORM_NAMES,
            **EXPERT_NAMES,
            **_SHARED_NAMES,
            "attention.input_norm": LAYER + "input_layernorm",
            "attention.output_norm": LAYER + "post_attn_norm",
            "mlp.input_norm": LAYER + "post_attention_layernorm",
            "mlp.expert_bias": LAYER + "moe.router.expert_bias",
            "mlp.output_norm": LAYER + "post_ffn_norm",
        },
        in_memory={
            "moe.router.expert_bias": "mlp.gate.e_score_correction_bias",
            "post_attn_norm": "post_self_attn_layernorm",
            "post_ffn_norm": "post_mlp_layernorm",
        },
    ),
    Target(
        name="mixtral",
        architecture="MixtralForCausalLM",
        runs_in="transformers, vLLM, SGLang and llama.cpp",
        placement="pre",
        mixture=Mixture(score="softmax", count="num_local_experts", width="intermediate_size"),
        names={
            **GLOBAL_NAMES,
            **ATTENTION_NAMES,
            "attention.input_norm": LAYER + "input_layernorm",
            "mlp.input_norm": LAYER + "post_attention_layernorm",
            "mlp.router": LAYER + "block_sparse_moe.gate",
            "mlp.experts.gate": LAYER + "block_sparse_moe.experts.{expert}.w1",
            "mlp.experts.up": LAYER + "block_sparse_moe.experts.{expert}.w3",
            "mlp.experts.down": LAYER + "block_sparse_moe.experts.{expert}.w2",
        },
        in_memory={"block_sparse_moe": "mlp"},
        settings={"sliding_window": None},
    ),
    Target(
        name="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        runs_in="transformers, vLLM, SGLang and, if the scores of the chosen experts add up to 1, llama.cpp",
        placement="pre",
        qk_norm=True,
        bias_switches={"attention_bias": _ATTENTION},
        mixture=Mixture(
            score="softmax",
            count="num_experts",
            normalized="norm_topk_prob",
            dense_layers="mlp_only_layers",
        ),
        names={**PRE_NAMES, **QK_NORM_NAMES, **EXPERT_NAMES},
        settings={"use_sliding_window": False, "sliding_window": None, **_EVERY_LAYER},
        num_layers_settings=("max_window_layers",),
    ),
    Target(
        name="qwen2_moe",
        architecture="Qwen2MoeForCausalLM",
        runs_in="transformers, vLLM, SGLang and, with --moe-router-pre-softmax, llama.cpp",
        placement="pre",
        bias_switches={"qkv_bias": frozenset({"qkv"})},
        whole_heads=True,  # in transformers 4.57
        mixture=Mixture(
            score="softmax",
            count="num_experts",
            normalized="norm_topk_prob",
            shared_width="shared_expert_intermediate_size",
            shared_switch=True,
            dense_layers="mlp_only_layers",
        ),
        names={
            **PRE_NAMES,
            **EXPERT_NAMES,
            "mlp.shared.gate": LAYER + "mlp.shared_expert.gate_proj",
            "mlp.shared.up": LAYER + "mlp.shared_expert.up_proj",
            "mlp.shared.down": LAYER + "mlp.shared_expert.down_proj",
            "mlp.shared.switch": LAYER + "mlp.shared_expert_gate",
        },
        settings={"use_sliding_window": False, "sliding_window": None, **_EVERY_LAYER},
        num_layers_settings=("max_window_layers",),
        layer_settings={"layer_types": "full_attention"},
    ),
    Target(
        name="glm4_moe",
        architecture="Glm4MoeForCausalLM",
        runs_in="transformers, vLLM, SGLang and llama.cpp",
        placement="pre",
        qk_norm="use_qk_norm",
        bias_switches={"attention_bias": frozenset({"qkv"})},
        partial_rotary=True,
        mixture=Mixture(
            score="sigmoid",
            count="n_routed_experts",
            normalized="norm_topk_prob",
            bias=True,
            groups=("n_group", "topk_group"),
            scale="routed_scaling_factor",
            shared_count="n_shared_experts",
            first_dense="first_k_dense_replace",
        ),
        names={
            **PRE_NAMES,
            **QK_NORM_NAMES,
            **EXPERT_NAMES,
            **_SHARED_NAMES,
            "mlp.expert_bias": LAYER + "mlp.gate.e_score_correction_bias",
        },
        settings={"num_nextn_predict_layers": 0},
    ),
)
