"""Megatron's models with a norm placement."""

from megatron_periln.models.gpt import GPTModelBuilder, GPTModelConfig
from megatron_periln.models.hybrid import HybridModelBuilder, HybridModelConfig
from megatron_periln.models.place_norms import place_norms

__all__ = ["GPTModelBuilder", "GPTModelConfig", "HybridModelBuilder", "HybridModelConfig", "place_norms"]
