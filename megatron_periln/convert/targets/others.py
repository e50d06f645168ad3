"""Architectures with output norms that Megatron can't compute, and why."""

from __future__ import annotations

__all__ = ["OTHERS"]

_GELU = "its MLP is gated by GELU, for which Megatron has no flag (--quick-geglu is another function)"

OTHERS: dict[str, str] = {
    "gemma2": f"it caps the scores of attention and the logits by a tanh; {_GELU}",
    "gemma3": "it reads images",
    "gemma3_text": f"its layers with a window have a rotary base of their own; {_GELU}",
    "beam": "it scales the residual stream at each add, queries by position, and caps the logits by a tanh",
    "muse_spark": "its experts have another width than its residual stream, which has gates; it reads images",
    "axk1": "its output norms are in the layers with experts alone, behind multi-latent attention",
    "axk2": "its input norms have gates, behind multi-latent attention",
}
"""By ``model_type``."""
