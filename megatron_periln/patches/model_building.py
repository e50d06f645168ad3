"""What Megatron's builders of models look up by name, and take from no argument."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core.models.hybrid import hybrid_block
from megatron.training.models import gpt

from megatron_periln.patches.registry import changes

__all__ = ["changed_mtp_spec", "final_norm_of_hybrid_stack"]


@changes(
    "megatron.training.models.gpt.mtp_block_spec",
    why="`GPTModelBuilder` derives the spec of multi-token prediction from the configuration anew, not "
    "from the layer spec that it is given, and has no hook for it",
    until="models/test_built_models.py::test_upstream_still_ignores_the_layer_spec_for_mtp",
)
@contextmanager
def changed_mtp_spec(change: Callable[[Any], Any]) -> Iterator[None]:
    """Give multi-token prediction ``change(spec)``, in models built meanwhile that have it."""
    build_spec = gpt.mtp_block_spec

    def changed(*args: Any, **kwargs: Any) -> Any:
        spec = build_spec(*args, **kwargs)
        return None if spec is None else change(spec)

    gpt.mtp_block_spec = changed
    try:
        yield
    finally:
        gpt.mtp_block_spec = build_spec


@changes(
    "megatron.core.models.hybrid.hybrid_block.TENorm",
    why="`HybridStack` builds Transformer Engine's norm as its final one; it takes none from the spec",
    until="patches/test_model_building.py::test_upstream_still_builds_the_final_norm_of_hybrid_stacks_by_name",
)
@contextmanager
def final_norm_of_hybrid_stack(norm: Any | None) -> Iterator[None]:
    """Give hybrid stacks that are built meanwhile the final norm ``norm``; None leaves them theirs."""
    original = hybrid_block.TENorm
    if norm is not None:
        hybrid_block.TENorm = norm
    try:
        yield
    finally:
        hybrid_block.TENorm = original
