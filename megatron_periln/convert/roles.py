"""The roles of a model's tensors, and Megatron's names for them."""

from __future__ import annotations

from megatron_periln.convert.architecture import Architecture

__all__ = ["GLOBAL_NAMES", "LAYER_NAMES", "layer_roles"]

GLOBAL_NAMES = {
    "embedding.weight": "embedding.word_embeddings.weight",
    "embedding_norm.weight": "embedding.norm.weight",
    "final_norm.weight": "decoder.final_layernorm.weight",
    "head.weight": "output_layer.weight",
}
"""From a role to Megatron's name in a checkpoint."""

LAYER_NAMES = {
    "attention.input_norm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "attention.qkv.weight": "self_attention.linear_qkv.weight",
    "attention.qkv.bias": "self_attention.linear_qkv.bias",
    "attention.q_norm.weight": "self_attention.q_layernorm.weight",
    "attention.k_norm.weight": "self_attention.k_layernorm.weight",
    "attention.proj.weight": "self_attention.linear_proj.weight",
    "attention.proj.bias": "self_attention.linear_proj.bias",
    "attention.output_norm.weight": "self_attn_bda.norm.weight",
    "mlp.input_norm.weight": "mlp.linear_fc1.layer_norm_weight",
    "mlp.gate_up.weight": "mlp.linear_fc1.weight",
    "mlp.gate_up.bias": "mlp.linear_fc1.bias",
    "mlp.down.weight": "mlp.linear_fc2.weight",
    "mlp.down.bias": "mlp.linear_fc2.bias",
    "mlp.output_norm.weight": "mlp_bda.norm.weight",
}
"""The same within a layer. A norm in the residual slot is an ``output_norm``, also Post-LN's."""

_BIAS_GROUPS = {"attention.qkv": "qkv", "attention.proj": "proj", "mlp.gate_up": "mlp", "mlp.down": "mlp"}


def layer_roles(architecture: Architecture) -> list[str]:
    """Return the roles of the tensors that each layer has."""
    placement = architecture.placement
    absent = set()
    if not placement.input:
        absent.add("input_norm")
    if not (placement.output or placement.after_add):
        absent.add("output_norm")
    if not architecture.qk_norm:
        absent |= {"q_norm", "k_norm"}
    return [
        role
        for role in LAYER_NAMES
        if role.split(".")[1] not in absent
        and (role.endswith(".weight") or _BIAS_GROUPS[role.removesuffix(".bias")] in architecture.biases)
    ]
