"""Everything that is changed in Megatron or torch.

`megatron_periln.patches.registry` describes each change, and docs/architecture.md has them in one table.
Nothing is imported here: what stands in for the GPU must be installed before megatron is imported.
"""
