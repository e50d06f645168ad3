"""GPT with a norm placement, built by Megatron's own builder.

``GPTModelConfig`` and ``GPTModelBuilder`` extend megatron/training/models/gpt.py;
``megatron.training.pretrain`` finds the builder through ``GPTModelConfig.builder``.
"""

from __future__ import annotations

import copy
import functools
import inspect
from argparse import Namespace
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    LayerNormImpl,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.training import global_vars
from megatron.training.models import gpt as upstream
from megatron.training.models.base import ModelConfig

from megatron_periln.models.finish import finish_model
from megatron_periln.models.from_arguments import transformer_config
from megatron_periln.models.initial_scale import with_plain_output_projections
from megatron_periln.models.local_attention import complete_local_spec
from megatron_periln.models.place_norms import place_norms
from megatron_periln.models.specs import change_attention, with_l2_norms
from megatron_periln.models.whole_query_norm import norm_whole_queries
from megatron_periln.norms import PERI, NormPlacement
from megatron_periln.patches.model_building import changed_mtp_spec

__all__ = ["GPTModelBuilder", "GPTModelConfig", "changed_config", "placed_layer_spec"]


@dataclass(kw_only=True)
class GPTModelConfig(upstream.GPTModelConfig):
    """Megatron's ``GPTModelConfig`` and where the norms stand.

    Attributes
    ----------
    norm_placement
        Applied to whatever ``transformer_layer_spec`` gives, and to multi-token prediction.
    fuse_pre_mlp_norm
        Whether attention's output norm and the MLP's input norm are one kernel (``--fuse-pre-mlp-norm``).
    whole_qk_norm
        Whether queries and keys are normed over all heads together (``--whole-qk-norm``).
    """

    builder: ClassVar[str] = "megatron_periln.models.gpt.GPTModelBuilder"
    norm_placement: NormPlacement = PERI
    fuse_pre_mlp_norm: bool = False
    whole_qk_norm: bool = False


class GPTModelBuilder(upstream.GPTModelBuilder):
    """Megatron's ``GPTModelBuilder`` for a `GPTModelConfig`."""

    def __init__(self, model_config: GPTModelConfig) -> None:
        model_config = _dense_while_upcycling(model_config)
        placed = functools.partial(placed_layer_spec, base=model_config.transformer_layer_spec)
        transformer = with_plain_output_projections(model_config.transformer, model_config.norm_placement)
        if not model_config.norm_placement.same_norms:
            # A checkpoint that stacks the layers' parameters would want each of them in every layer.
            transformer = copy.copy(transformer)
            transformer.hetereogenous_dist_checkpoint = True
        super().__init__(changed_config(model_config, transformer=transformer, transformer_layer_spec=placed))

    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> GPTModel:
        """Build one pipeline stage, as upstream does, with its norms placed."""
        config: GPTModelConfig = self._model_config
        with changed_mtp_spec(functools.partial(_place, config=config)):
            model = super().build_model(pg_collection, pre_process, post_process, vp_stage)
        finish_model(model, config.norm_placement)
        return model


def changed_config[Config: ModelConfig](config: Config, **changes: Any) -> Config:
    """Return a copy of a model's configuration with fields changed; its ``transformer`` is the same.

    ``dataclasses.replace`` would set fields that both have, as latent attention's have ``rotary_base``, back
    to their defaults: the model's configuration hands them on to ``transformer`` and keeps none.
    """
    changed = copy.copy(config)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed


def _dense_while_upcycling(config: GPTModelConfig) -> GPTModelConfig:
    """Return the configuration of the dense model, while Megatron upcycles and asks for that one.

    It says so by its global arguments alone, to which its own builder does not look.
    """
    args = global_vars._GLOBAL_ARGS
    if args is None or not args.moe_use_upcycling or args.num_experts is not None:
        return config
    dense = Namespace(**{**vars(args), "moe_ffn_hidden_size": None})  # which refuses one
    return changed_config(config, transformer=transformer_config(dense))


def placed_layer_spec(
    config: GPTModelConfig, vp_stage: int | None = None, base: Any = None
) -> TransformerBlockSubmodules:
    """Return the block spec of one pipeline stage: Megatron's own, or ``base``, with norms placed.

    Parameters
    ----------
    config
        The model's configuration.
    vp_stage
        The virtual pipeline stage.
    base
        A layer or block spec, or a function of ``config`` (and ``vp_stage``) that returns one;
        None for Megatron's default.
    """
    if base is None:
        base = upstream.default_layer_spec
    if callable(base) and not isinstance(base, ModuleSpec):
        takes_stage = "vp_stage" in inspect.signature(base).parameters
        base = base(config, vp_stage=vp_stage) if takes_stage else base(config)
    if isinstance(base, ModuleSpec):
        layers = [base] * get_num_layers_to_build(config.transformer, vp_stage)
        base = TransformerBlockSubmodules(layer_specs=layers, layer_norm=LayerNormImpl)
    in_pipeline = config.transformer.pipeline_model_parallel_size > 1
    before = get_transformer_layer_offset(config.transformer, vp_stage) if in_pipeline else 0
    return _place(base, config, first_layer=before + 1)


def _place(spec: Any, config: GPTModelConfig, first_layer: int = 1) -> Any:
    if config.transformer.qk_l2_norm:
        spec = with_l2_norms(spec)
    if config.whole_qk_norm:
        spec = change_attention(spec, functools.partial(norm_whole_queries, config=config.transformer))
    return place_norms(
        complete_local_spec(spec, config.transformer),
        config.norm_placement,
        config.transformer,
        fuse_pre_mlp_norm=config.fuse_pre_mlp_norm,
        first_layer=first_layer,
    )
