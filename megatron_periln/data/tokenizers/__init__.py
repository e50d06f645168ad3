"""Megatron's tokenizers, and encoders that give their ids faster."""
