"""Peri-LN for NVIDIA Megatron: a norm on both sides of every transformer sublayer."""

from megatron_periln.version import __version__

__all__ = ["__version__"]
