"""Megatron's HybridModel with a norm placement.

In a hybrid model each sublayer is a layer of its own, named by a symbol in
``hybrid_layer_pattern``: ``*`` attention, ``-`` MLP, ``E`` mixture of experts, ``M`` Mamba, ``G`` gated
delta net. ``"*-" * L`` is the GPT of ``L`` layers. Upstream means HybridModel to take GPTModel's place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import ClassVar

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.models.hybrid import hybrid_block
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)
from megatron.training.models import hybrid as upstream
from torch import nn

from megatron_periln.models.finish import finish_model
from megatron_periln.models.gpt import changed_config
from megatron_periln.models.local_attention import complete_local_spec
from megatron_periln.models.place_norms import final_norm, place_norms
from megatron_periln.models.specs import with_l2_norms, with_submodules
from megatron_periln.norms import MODELS, PERI, EngineInputNorm, NoNorm, NormPlacement
from megatron_periln.patches.model_building import final_norm_of_hybrid_stack

__all__ = ["HybridModelBuilder", "HybridModelConfig", "local_stack_spec"]

# What a stack's layers, and its multi-token prediction, are made of.
_PLACED = (TransformerLayerSubmodules, MambaLayerSubmodules, MultiTokenPredictionBlockSubmodules)


@dataclass(kw_only=True)
class HybridModelConfig(upstream.HybridModelConfig):
    """Megatron's ``HybridModelConfig`` and where the norms stand.

    Attributes
    ----------
    norm_placement
        Applied to every layer: each has one sublayer, and one bias-dropout-add.
    rope_scaling, rope_scaling_factor
        Whether and by which factor RoPE is scaled as in Llama 3, which upstream has for GPT alone.
    """

    builder: ClassVar[str] = "megatron_periln.models.hybrid.HybridModelBuilder"
    norm_placement: NormPlacement = PERI
    rope_scaling: bool = False
    rope_scaling_factor: float = 8.0


class HybridModelBuilder(upstream.HybridModelBuilder):
    """Megatron's ``HybridModelBuilder`` for a `HybridModelConfig`."""

    def __init__(self, model_config: HybridModelConfig) -> None:
        config, placement = model_config.transformer, model_config.norm_placement
        spec = model_config.hybrid_stack_spec or hybrid_stack_spec
        if spec is hybrid_stack_spec and config.transformer_impl == "local":
            spec = local_stack_spec(config)
        if config.qk_l2_norm:
            spec = with_l2_norms(spec)
        layers = {
            field.name: place_norms(layer, placement, config)
            for field in fields(spec.submodules)
            if isinstance(layer := getattr(spec.submodules, field.name), ModuleSpec)
            and isinstance(layer.submodules, _PLACED)
        }
        placed = with_submodules(spec, replace(spec.submodules, **layers))
        super().__init__(changed_config(model_config, hybrid_stack_spec=placed))

    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> HybridModel:
        """Build one pipeline stage, as upstream does, with its norms placed."""
        config: HybridModelConfig = self._model_config
        with final_norm_of_hybrid_stack(_final_norm(config)):
            model = super().build_model(pg_collection, pre_process, post_process, vp_stage)
        if config.rope_scaling and isinstance(
            rope := getattr(model, "rotary_pos_emb", None), RotaryEmbedding
        ):
            rope.inv_freq = rope._apply_scaling(rope.inv_freq, factor=config.rope_scaling_factor)
        finish_model(model, config.norm_placement)
        return model


def local_stack_spec(config: TransformerConfig) -> ModuleSpec:
    """Return a hybrid stack of Megatron's local layers; upstream has one for Transformer Engine only."""
    build = functools.partial(
        get_gpt_layer_local_submodules,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )

    def layer(module: type, whole: TransformerLayerSubmodules, *names: str) -> ModuleSpec:
        parts = {name: getattr(whole, name) for name in names}
        keys = {key: value for key, value in whole.sharded_state_dict_keys_map.items() if key[:-1] in names}
        return ModuleSpec(
            module=module, submodules=TransformerLayerSubmodules(**parts, sharded_state_dict_keys_map=keys)
        )

    def with_delta_net(whole: TransformerLayerSubmodules) -> TransformerLayerSubmodules:
        net = GatedDeltaNetSubmodules(
            in_proj=ColumnParallelLinear, out_norm=WrappedTorchNorm, out_proj=RowParallelLinear
        )
        keys = {"input_layernorm.": "self_attention.in_proj.layer_norm_"}
        return replace(
            whole,
            self_attention=ModuleSpec(module=GatedDeltaNet, submodules=net),
            sharded_state_dict_keys_map=keys,
        )

    attention = ("input_layernorm", "self_attention", "self_attn_bda")
    mlp = ("pre_mlp_layernorm", "mlp", "mlp_bda")
    mixer = MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear)
    mamba = MambaLayerSubmodules(
        norm=WrappedTorchNorm,
        mixer=ModuleSpec(module=MambaMixer, submodules=mixer),
        mamba_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map={"norm.": "mixer.in_proj.layer_norm_"},
    )
    predictor = MultiTokenPredictionLayerSubmodules(
        enorm=WrappedTorchNorm,
        hnorm=WrappedTorchNorm,
        eh_proj=ColumnParallelLinear,
        mtp_model_layer=None,  # a stack of the layers that the pattern names
        layer_norm=WrappedTorchNorm,
    )
    predictors = MultiTokenPredictionBlockSubmodules(
        layer_specs=[ModuleSpec(module=MultiTokenPredictionLayer, submodules=predictor)]
    )
    stack = hybrid_block.HybridStackSubmodules(
        mtp_block_spec=ModuleSpec(module=MultiTokenPredictionBlock, submodules=predictors),
        mamba_layer=ModuleSpec(module=MambaLayer, submodules=mamba),
        gdn_layer=layer(TransformerLayer, with_delta_net(build()), *attention),
        attention_layer=layer(TransformerLayer, build(), *attention),
        mla_layer=layer(TransformerLayer, build(multi_latent_attention=True), *attention),
        mlp_layer=layer(MLPLayer, build(), *mlp),
        moe_layer=layer(MoETransformerLayer, build(config.num_moe_experts or 1), *mlp),
    )
    spec = ModuleSpec(module=hybrid_block.HybridStack, submodules=stack)
    return complete_local_spec(spec, config)


def _final_norm(config: HybridModelConfig) -> Callable[..., nn.Module] | None:
    """Return the final norm of a hybrid stack, None for upstream's own, Transformer Engine's."""
    if not config.norm_placement.final:
        return NoNorm
    norm = EngineInputNorm if config.transformer.fp32_residual_connection else None
    if config.transformer.transformer_impl == "local":
        (norm,) = complete_local_spec([WrappedTorchNorm], config.transformer)
    own = config.norm_placement.norms.final != MODELS
    return final_norm(norm or EngineInputNorm, config.norm_placement) if own else norm
