"""Norm placement: where norms stand, and the modules that stand there."""

from megatron_periln.norms.embedding import EmbeddingNorm
from megatron_periln.norms.modules import InputNorm, JoinedNorm, NoNorm, Norm
from megatron_periln.norms.placement import OUTPUT, PERI, PLACEMENTS, POST, PRE, NormPlacement
from megatron_periln.norms.residual import AddNorm, OutputNormAdd, ResidualNorm

__all__ = [
    "OUTPUT",
    "PERI",
    "PLACEMENTS",
    "POST",
    "PRE",
    "AddNorm",
    "EmbeddingNorm",
    "InputNorm",
    "JoinedNorm",
    "NoNorm",
    "Norm",
    "NormPlacement",
    "OutputNormAdd",
    "ResidualNorm",
]
