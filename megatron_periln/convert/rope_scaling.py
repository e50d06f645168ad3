"""Rotary embeddings for longer sequences than trained on: in transformers, and in Megatron."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_periln.errors import UsageError
from megatron_periln.models import GPTModelConfig

__all__ = ["RopeScaling", "yarn_attention_factor"]

_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What ``--use-rope-scaling`` does (megatron/core/models/common/embeddings/rotary_pos_embedding.py)."""


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How the inverse frequencies of rotary embeddings are divided.

    Parameters
    ----------
    kind
        ``rope_type`` in transformers: ``llama3`` divides the low ones, ``linear`` all, ``yarn`` the low ones,
        between bounds of its own, and scales sine and cosine.
    factor
        By which.
    original_positions, beta_fast, beta_slow, truncate
        Of ``yarn``: the longest sequence without it, and its bounds.
    """

    kind: str
    factor: float
    original_positions: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    @staticmethod
    def of_config(config: GPTModelConfig) -> RopeScaling | None:
        """Return that of Megatron's model."""
        if config.position_embedding_type == "yarn":
            core = config.transformer
            return RopeScaling(
                kind="yarn",
                factor=core.yarn_rotary_scaling_factor,
                original_positions=core.yarn_original_max_position_embeddings,
                beta_fast=core.yarn_beta_fast,
                beta_slow=core.yarn_beta_slow,
                truncate=core.yarn_correction_range_round_to_int,
            )
        if config.rope_scaling:
            return RopeScaling(kind="llama3", factor=config.rope_scaling_factor)
        if config.seq_len_interpolation_factor is not None:
            return RopeScaling(kind="linear", factor=config.seq_len_interpolation_factor)
        return None

    @staticmethod
    def of_settings(settings: Mapping[str, Any]) -> RopeScaling | None:
        """Return that of a model of transformers, from ``rope_parameters`` without base and fraction.

        Raises
        ------
        UsageError
            If Megatron has nothing for it.
        """
        rest = {name: value for name, value in settings.items() if value is not None}
        kind, factor = rest.pop("rope_type", "default"), rest.pop("factor", 1.0)
        if rest.get("type") == kind:  # the name until transformers 4.43
            del rest["type"]
        if kind == "default" and not rest:
            return None
        if kind == "linear" and not rest and factor == int(factor):
            return RopeScaling(kind=kind, factor=float(factor))
        if kind == "llama3" and rest == _LLAMA3:
            return RopeScaling(kind=kind, factor=float(factor))
        if kind == "yarn" and (scaling := _yarn(rest, factor)) is not None:
            return scaling
        raise UsageError(
            f"the model scales its rotary frequencies by {dict(settings)}; Megatron has linear with a factor "
            f"that is a whole number, yarn with its own attention_factor, and llama3 with {_LLAMA3}"
        )

    def as_settings(self) -> dict[str, Any]:
        """Return what the configuration of transformers holds."""
        settings: dict[str, Any] = {"rope_type": self.kind, "factor": float(self.factor)}
        if self.kind == "llama3":
            settings |= _LLAMA3
        if self.kind == "yarn":
            settings["original_max_position_embeddings"] = self.original_positions
            settings |= {"beta_fast": self.beta_fast, "beta_slow": self.beta_slow, "truncate": self.truncate}
        return settings

    def as_flags(self) -> list[list[str]]:
        """Return Megatron's flags, but for ``--position-embedding-type``."""
        if self.kind == "linear":
            return [["--rotary-seq-len-interpolation-factor", str(int(self.factor))]]
        if self.kind == "llama3":
            return [["--use-rope-scaling"], ["--rope-scaling-factor", str(self.factor)]]
        rounding = "" if self.truncate else "no-"
        return [
            ["--rotary-scaling-factor", str(self.factor)],
            ["--yarn-original-max-position-embeddings", str(self.original_positions)],
            ["--yarn-beta-fast", str(self.beta_fast)],
            ["--yarn-beta-slow", str(self.beta_slow)],
            [f"--{rounding}yarn-correction-range-round-to-int"],
        ]


def yarn_attention_factor(factor: float) -> float:
    """Return by what YaRN scales sine and cosine where nothing else is said."""
    return 0.1 * math.log(factor) + 1 if factor > 1 else 1.0


def _yarn(rest: dict[str, Any], factor: float) -> RopeScaling | None:
    """Return YaRN as its settings say, None if Megatron's computes something else."""
    own = yarn_attention_factor(factor)
    if not math.isclose(rest.pop("attention_factor", own), own):
        return None
    original = rest.pop("original_max_position_embeddings", None)
    bounds = {name: float(rest.pop(name, default)) for name, default in (("beta_fast", 32), ("beta_slow", 1))}
    truncate = rest.pop("truncate", True)
    if rest or original is None:
        return None
    return RopeScaling(
        kind="yarn", factor=float(factor), original_positions=int(original), truncate=truncate, **bounds
    )
