"""Faults of megatron-core 0.19 that stand in the way, mended one function each.

Each says what goes wrong and where upstream; its test in tests/patches fails once upstream has mended it.
All act on any device.
"""

from __future__ import annotations

from megatron_periln.patches import checkpoint_loading, layers, optimizers

__all__ = ["apply"]

_applied = False


def apply() -> None:
    """Mend them all, once."""
    global _applied
    if _applied:
        return
    _applied = True
    for mend in (*layers.FIXES, *optimizers.FIXES):
        mend()
    checkpoint_loading.restrict()
