"""From Megatron's arguments to the configuration of a model, with what Megatron's own way there drops."""

from __future__ import annotations

import copy
from argparse import Namespace
from typing import Any

from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import argument_utils
from torch import nn

__all__ = ["freeze_all_layers", "gpt_config_from_args", "hybrid_config_from_args", "transformer_config"]


def gpt_config_from_args(args: Namespace, model_config_cls: type) -> Any:
    """Return Megatron's ``gpt_config_from_args``; with ``--rope-scaling-factor``, ``--freeze-all-layers``."""
    transformer = transformer_config(args)
    config = argument_utils.gpt_config_from_args(args, transformer, model_config_cls=model_config_cls)
    config.rope_scaling_factor = getattr(args, "rope_scaling_factor", config.rope_scaling_factor)
    config.whole_qk_norm = getattr(args, "whole_qk_norm", False)
    _freeze(args, config)
    return config


def hybrid_config_from_args(args: Namespace, model_config_cls: type) -> Any:
    """Return Megatron's ``hybrid_config_from_args``, with the scaling of RoPE and ``--freeze-all-layers``."""
    transformer = transformer_config(args)
    config = argument_utils.hybrid_config_from_args(args, transformer, model_config_cls=model_config_cls)
    config.rope_scaling = args.use_rope_scaling
    config.rope_scaling_factor = args.rope_scaling_factor
    _freeze(args, config)
    return config


def transformer_config(args: Namespace) -> TransformerConfig:
    """Return Megatron's configuration; ``--init-method-xavier-uniform`` ends there in a TypeError."""
    if not args.init_method_xavier_uniform:
        return argument_utils.core_transformer_config_from_args(args)
    given = copy.copy(args)
    given.init_method_xavier_uniform = False
    config = argument_utils.core_transformer_config_from_args(given)
    config.init_method = config.output_layer_init_method = nn.init.xavier_uniform_
    if args.embedding_init_method_std is None:
        config.embedding_init_method = nn.init.xavier_uniform_
    return config


def _freeze(args: Namespace, config: Any) -> None:
    if args.freeze_all_layers:
        config.pre_wrap_hooks = [*config.pre_wrap_hooks, freeze_all_layers]


def freeze_all_layers(chunks: list[MegatronModule]) -> list[MegatronModule]:
    """Let nothing of a model be trained, as ``get_model`` of megatron/training/training.py does."""
    for chunk in chunks:
        chunk.requires_grad_(False)
        for module in chunk.modules():
            if hasattr(module, "frozen_expert_bias"):
                module.frozen_expert_bias = True
    return chunks
