"""What a layer spec can't say of a model with norms placed."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_periln.models.initial_scale import scale_initial_weights
from megatron_periln.models.residual_adds import SLOTS, check_slots, rule_of
from megatron_periln.norms import (
    EmbeddingNorm,
    FusedInputNorm,
    NormedBiasDropoutAdd,
    NormPlacement,
    ScaledInputNorm,
)
from megatron_periln.patches.tensor_parallel_gradients import fix_delta_nets, fix_latent_attention
from megatron_periln.patches.transformer_layers import gather_before_graphs, keep_grad_mode_of_caller

__all__ = ["finish_model"]

_INPUT_NORMS = {"self_attn_bda": "input_layernorm", "mlp_bda": "pre_mlp_layernorm"}


def finish_model(model: GPTModel | HybridModel, placement: NormPlacement) -> None:
    """Do to a built pipeline stage what a layer spec can't say, such as the embedding norm.

    Raises
    ------
    UsageError
        If a layer adds to the residual stream without the norm that the placement has there.
    """
    for layer in model.modules():
        if isinstance(layer, TransformerLayer | MambaLayer):
            _set_scales(layer, placement)
            _finish_layer(layer)
    fix_latent_attention(model)
    fix_delta_nets(model)
    if placement.embedding and model.pre_process:
        EmbeddingNorm(model.config, placement.norms.embedding).attach(model)
    if placement.initial_scale != 1.0:
        scale_initial_weights(model, placement)
    check_slots(model, placement)


def _set_scales(layer: Any, placement: NormPlacement) -> None:
    """Give a layer's norms and adds the scales of its place, by the number that Megatron has given it."""
    for slot, norm in ((slot, _INPUT_NORMS.get(slot)) for slot in SLOTS):
        if isinstance(bda := getattr(layer, slot, None), NormedBiasDropoutAdd):
            bda.set_scales(rule_of(layer, slot, placement))
        if norm and isinstance(input_norm := getattr(layer, norm, None), ScaledInputNorm):
            input_norm.scale = rule_of(layer, slot, placement).input_scale


def _finish_layer(layer: Any) -> None:
    bdas = [bda for slot in SLOTS if isinstance(bda := getattr(layer, slot, None), NormedBiasDropoutAdd)]
    if bdas:
        keep_grad_mode_of_caller(layer)
    if bdas and isinstance(layer, TransformerLayer):  # Mamba layers are in graphs whole
        gather_before_graphs(layer, bdas)
    if isinstance(getattr(layer, "pre_mlp_layernorm", None), FusedInputNorm):
        layer.self_attn_bda.norm.compute_next(layer.pre_mlp_layernorm)
