"""Pretraining with Megatron: arguments, data, forward step."""
