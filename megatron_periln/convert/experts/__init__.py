"""Mixtures of experts: what they compute, their settings, and their weights in Megatron and transformers."""
