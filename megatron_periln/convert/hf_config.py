"""A model's configuration in transformers: what an export writes, and what an import reads of it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_periln.convert.architecture import Architecture, Rope
from megatron_periln.convert.experts.config import expert_settings, experts_of
from megatron_periln.convert.layer_kinds import LayerKinds
from megatron_periln.convert.model_folder import SpecialTokens, check_model_folder, transformers_config
from megatron_periln.convert.rope_scaling import RopeScaling
from megatron_periln.convert.safetensors_folder import dtype_name
from megatron_periln.convert.source.configuration import (
    Statements,
    refuse_ids_out_of_range,
    refuse_sizes_of_nothing,
)
from megatron_periln.convert.targets import OTHERS, TARGETS, Target
from megatron_periln.convert.weights import is_exported_tied
from megatron_periln.errors import UsageError
from megatron_periln.norms import NormPlacement

__all__ = ["architecture_of", "generation_config", "model_config", "read_config"]

_POSSIBLE_BIASES: tuple[frozenset[str], ...] = (
    frozenset(),
    frozenset({"qkv"}),
    frozenset({"qkv", "proj", "mlp"}),
)
"""The biases that Megatron can have."""


def model_config(
    architecture: Architecture, target: Target, tokens: SpecialTokens, dtype: torch.dtype
) -> dict[str, Any]:
    """Return what config.json holds.

    What a runtime reads is written even if it is transformers' default: others have none, or another. The
    rotary parameters are written twice: all but transformers 5 take ``rope_theta``,
    ``partial_rotary_factor`` and ``rope_scaling``, and some want the last even if it is null.
    """
    kinds = architecture.kinds or LayerKinds.all_plain(architecture.num_layers)
    return {
        "architectures": [target.architecture],
        "model_type": target.name,
        "vocab_size": architecture.vocab_size,
        "hidden_size": architecture.hidden_size,
        "intermediate_size": architecture.ffn_hidden_size,
        "num_hidden_layers": architecture.num_layers,
        "num_attention_heads": architecture.num_heads,
        "num_key_value_heads": architecture.num_kv_heads,
        "head_dim": architecture.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": architecture.max_positions,
        target.eps_name: architecture.eps,
        "tie_word_embeddings": is_exported_tied(architecture, target),
        "attention_dropout": 0.0,
        "use_cache": True,
        **_rotary_settings(architecture.rope, target),
        **{switch: bool(group & architecture.biases) for switch, group in target.bias_switches.items()},
        **_qk_norm_setting(architecture, target),
        **kinds.settings(target, architecture.max_positions),
        **expert_settings(architecture.experts, target.mixture),
        **target.settings,
        **_unit_multipliers(architecture, target),
        **dict.fromkeys(target.num_layers_settings, architecture.num_layers),
        **{name: [value] * architecture.num_layers for name, value in target.layer_settings.items()},
        **({} if target.root_scale is None else {target.root_scale: False}),
        **tokens.as_settings(target.no_eos),
        "dtype": dtype_name(dtype),
        "torch_dtype": dtype_name(dtype),
    }


def generation_config(tokens: SpecialTokens) -> dict[str, Any]:
    """Return what generation_config.json holds: what is null there, generation does without."""
    return tokens.as_settings()


def _qk_norm_setting(architecture: Architecture, target: Target) -> dict[str, bool]:
    return {target.qk_norm: architecture.qk_norm} if isinstance(target.qk_norm, str) else {}


def _unit_multipliers(architecture: Architecture, target: Target) -> dict[str, float]:
    """Return multipliers that change nothing: an export's are in its weights."""
    return {
        name: architecture.head_dim**-0.5 if attribute == "attention_scale" else 1.0
        for name, attribute in target.multipliers.items()
    }


def _rotary_settings(rope: Rope, target: Target) -> dict[str, Any]:
    scaling = {"rope_type": "default"} if rope.scaling is None else rope.scaling.as_settings()
    fraction = {"partial_rotary_factor": rope.fraction} if target.partial_rotary else {}
    parameters: dict[str, Any] = {"rope_theta": float(rope.theta), **scaling, **fraction}
    if target.rope_labels:
        nested = {"rope_parameters": {label: dict(parameters) for label in target.rope_labels}}
        old = {"rope_theta": float(rope.theta), "rope_scaling": None}  # of transformers 4, which has no lfm3
        return nested if target.rope_labels == ("full_attention",) else nested | old
    return {
        "rope_parameters": parameters,
        "rope_theta": float(rope.theta),
        "rope_scaling": None if rope.scaling is None else scaling,
        **fraction,
    }


def read_config(model: Path) -> tuple[Any, Target, Statements]:
    """Return the configuration of a model in a folder, the target it is an instance of, and the file's words.

    Raises
    ------
    UsageError
        If the folder holds no model, or a quantized one, or one of an architecture that is not among the
        targets, or transformers can't follow its configuration.
    """
    check_model_folder(model)
    said = Statements.read(model)
    config = transformers_config(model)
    if (why := OTHERS.get(config.model_type)) is not None:
        raise UsageError(f"--model {model} is a {config.model_type}, which can't be imported: {why}")
    if config.model_type not in TARGETS:
        raise UsageError(
            f"--model {model} is a {config.model_type}; those that can be imported are {', '.join(TARGETS)}"
        )
    target = TARGETS[config.model_type]
    refuse_sizes_of_nothing(config, said, target.mixture.sizes if target.mixture else ())
    refuse_ids_out_of_range(config, said)
    return config, target, said


def architecture_of(config: Any, target: Target) -> Architecture:
    """Return what a model of transformers computes.

    Parameters
    ----------
    config
        Its configuration, a ``PretrainedConfig``.
    target
        The target it is an instance of.

    Raises
    ------
    UsageError
        For a setting that Megatron has nothing for.
    """
    _check_settings(config, target)
    biases = frozenset().union(
        *(group for switch, group in target.bias_switches.items() if getattr(config, switch))
    )
    if biases not in _POSSIBLE_BIASES:
        raise UsageError(
            f"the model has biases in {', '.join(sorted(biases))} only; Megatron has them in queries, keys "
            "and values, or in every linear"
        )
    architecture = Architecture(
        placement=NormPlacement.named(target.placement).with_options(embedding=target.embedding_norm),
        eps=getattr(config, target.eps_name),
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=getattr(config, "intermediate_size", None) or getattr(config, _expert_width(target)),
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        rope=_rope(config, target),
        experts=experts_of(config, target.mixture),
        kinds=LayerKinds.of_settings(config, target).or_none(),
        attention_gate=target.gate,
        whole_qk_norm=target.whole_qk_norm,
        qk_norm=getattr(config, target.qk_norm) if isinstance(target.qk_norm, str) else target.qk_norm,
        biases=biases,
        tied=config.tie_word_embeddings,
    )
    if target.root_scale is not None and getattr(config, target.root_scale):
        architecture = replace(architecture, embedding_scale=config.hidden_size**0.5)
    scales = {attribute: getattr(config, name) for name, attribute in target.multipliers.items()}
    if "attention_scale" in scales:
        scales["attention_scale"] /= architecture.head_dim**-0.5
    return replace(architecture, **scales)


def _expert_width(target: Target) -> str:
    """Return the setting of the experts' width, which is all that a model without dense layers has."""
    assert target.mixture is not None
    return target.mixture.width


def _check_settings(config: Any, target: Target) -> None:
    settings = {"hidden_act": "silu", **target.settings}
    for name, value in settings.items():
        theirs = getattr(config, name, value)
        if (theirs or None) != (value or None):
            raise UsageError(
                f"the model has {name} {theirs}, and Megatron has nothing for other than {value}"
            )
    for name, value in target.layer_settings.items():
        theirs = set(getattr(config, name, None) or [value])
        if theirs != {value}:
            raise UsageError(
                f"the model has {name} {', '.join(sorted(theirs))}; only {value} can be imported"
            )


def _rope(config: Any, target: Target) -> Rope:
    parameters = dict(config.rope_parameters)
    if target.rope_labels:
        first, *others = (dict(parameters[label]) for label in target.rope_labels)
        if any(other != first for other in others):
            raise UsageError(
                f"the model's layers rotate otherwise with a window than without: {parameters}; Megatron has "
                "one way for all"
            )
        parameters = first
    theta, fraction = parameters.pop("rope_theta"), parameters.pop("partial_rotary_factor", 1.0)
    scaling = RopeScaling.of_settings(parameters)
    if scaling is not None and scaling.kind == "yarn" and (target.interleaved or fraction != 1):
        raise UsageError(
            "the model has YaRN and rotates neighbours, or a part of each head; Megatron's YaRN does neither"
        )
    if not isinstance(theta, int | float) or not 1 <= theta < math.inf or theta != int(theta):
        raise UsageError(
            f"the model has rope_theta {theta}; Megatron's --rotary-base is a whole number above 0"
        )
    return Rope(
        theta=int(theta),
        fraction=fraction if target.partial_rotary else 1.0,
        interleaved=target.interleaved,
        scaling=scaling,
    )
