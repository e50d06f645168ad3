"""Megatron's indexed datasets on disk."""
