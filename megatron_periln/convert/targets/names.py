"""Names of tensors that many architectures share, by their neutral names."""

from __future__ import annotations

__all__ = [
    "ATTENTION_NAMES",
    "EXPERT_NAMES",
    "GLOBAL_NAMES",
    "LAYER",
    "MLP_NAMES",
    "PRE_NAMES",
    "QK_NORM_NAMES",
]

LAYER = "model.layers.{layer}."

GLOBAL_NAMES = {"embedding": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}

ATTENTION_NAMES = {
    "attention.q": LAYER + "self_attn.q_proj",
    "attention.k": LAYER + "self_attn.k_proj",
    "attention.v": LAYER + "self_attn.v_proj",
    "attention.proj": LAYER + "self_attn.o_proj",
}

QK_NORM_NAMES = {
    "attention.q_norm": LAYER + "self_attn.q_norm",
    "attention.k_norm": LAYER + "self_attn.k_norm",
}

MLP_NAMES = {
    "mlp.gate": LAYER + "mlp.gate_proj",
    "mlp.up": LAYER + "mlp.up_proj",
    "mlp.down": LAYER + "mlp.down_proj",
}

PRE_NAMES = {
    **GLOBAL_NAMES,
    **ATTENTION_NAMES,
    "attention.input_norm": LAYER + "input_layernorm",
    "mlp.input_norm": LAYER + "post_attention_layernorm",
    **MLP_NAMES,
}

EXPERT_NAMES = {
    "mlp.router": LAYER + "mlp.gate",
    "mlp.experts.gate": LAYER + "mlp.experts.{expert}.gate_proj",
    "mlp.experts.up": LAYER + "mlp.experts.{expert}.up_proj",
    "mlp.experts.down": LAYER + "mlp.experts.{expert}.down_proj",
}
