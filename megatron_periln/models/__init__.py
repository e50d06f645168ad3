"""Megatron's models with a norm placement."""

from megatron_periln.models.gpt import GPTModelBuilder, GPTModelConfig
from megatron_periln.models.place_norms import place_norms

__all__ = ["GPTModelBuilder", "GPTModelConfig", "place_norms"]
