"""Norm placement: where norms stand, and the modules that stand there."""

from megatron_periln.norms.embedding import EmbeddingNorm
from megatron_periln.norms.modules import (
    EngineInputNorm,
    FusedInputNorm,
    InputNorm,
    NoNorm,
    Norm,
    NormedBiasDropoutAdd,
    OutputNorm,
    PlainAdd,
    PostNorm,
    ScaledInputNorm,
)
from megatron_periln.norms.placement import OUTPUT, PERI, PLACEMENTS, POST, PRE, NormPlacement, SublayerRule
from megatron_periln.norms.settings import MODELS, NORM_KINDS, NormSettings

__all__ = [
    "MODELS",
    "NORM_KINDS",
    "OUTPUT",
    "PERI",
    "PLACEMENTS",
    "POST",
    "PRE",
    "EmbeddingNorm",
    "EngineInputNorm",
    "FusedInputNorm",
    "InputNorm",
    "NoNorm",
    "Norm",
    "NormPlacement",
    "NormSettings",
    "NormedBiasDropoutAdd",
    "OutputNorm",
    "PlainAdd",
    "PostNorm",
    "ScaledInputNorm",
    "SublayerRule",
]
