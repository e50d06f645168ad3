"""Megatron's optimizers beside Adam and SGD."""
