"""The configuration of an exported model: config.json and generation_config.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megatron_periln.convert.architecture import Architecture, Rope
from megatron_periln.convert.targets import Target
from megatron_periln.convert.tensors import is_exported_tied

__all__ = ["LLAMA3_SCALING", "SpecialTokens", "generation_config", "model_config"]

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""What ``--use-rope-scaling`` does (megatron/core/models/common/embeddings/rotary_pos_embedding.py)."""


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Ids of a tokenizer's special tokens; None where it has none."""

    bos: int | None = None
    eos: int | None = None
    pad: int | None = None

    def as_settings(self) -> dict[str, int | None]:
        """Return them under the names that transformers gives them."""
        return {"bos_token_id": self.bos, "eos_token_id": self.eos, "pad_token_id": self.pad}


def model_config(
    architecture: Architecture, target: Target, tokens: SpecialTokens, dtype: torch.dtype
) -> dict[str, Any]:
    """Return what config.json holds.

    The rotary parameters are written twice: transformers 4 ignores ``rope_parameters`` and takes
    ``rope_theta`` and ``partial_rotary_factor``.
    """
    dtype_name = str(dtype).removeprefix("torch.")
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
        **target.settings,
        **{name: [value] * architecture.num_layers for name, value in target.layer_settings.items()},
        **tokens.as_settings(),
        "dtype": dtype_name,
        "torch_dtype": dtype_name,
    }


def generation_config(tokens: SpecialTokens) -> dict[str, Any]:
    """Return what generation_config.json holds."""
    return {name: value for name, value in tokens.as_settings().items() if value is not None}


def _rotary_settings(rope: Rope, target: Target) -> dict[str, Any]:
    scaling = LLAMA3_SCALING if rope.llama3 else {"rope_type": "default"}
    fraction = {"partial_rotary_factor": rope.fraction} if target.partial_rotary else {}
    parameters: dict[str, Any] = {"rope_theta": float(rope.theta), **scaling, **fraction}
    if target.rope_label is not None:
        return {"rope_parameters": {target.rope_label: parameters}}
    settings: dict[str, Any] = {
        "rope_parameters": parameters,
        "rope_theta": float(rope.theta),
        **fraction,
    }
    return {**settings, "rope_scaling": LLAMA3_SCALING} if rope.llama3 else settings
