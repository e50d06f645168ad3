"""What is changed in the rotary embedding of a built model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from megatron_periln.patches.registry import changes

__all__ = ["rotated_at"]


@changes(
    "megatron.core.models.common.embeddings.rotary_pos_embedding.RotaryEmbedding.forward",
    why="a model asks it for positions 0, 1, 2 and so on, whatever position ids it is given: "
    "scalings of RoPE that differ at far positions only would all pass a parity check",
    until="patches/test_rotary.py::test_upstream_still_counts_rotary_positions_from_zero",
)
@contextmanager
def rotated_at(rope: Any, positions: Tensor) -> Iterator[None]:
    """Have a model's rotary embeddings be those of ``positions``, ``[sequence]``, meanwhile."""

    def forward(*_: Any, **__: Any) -> Any:
        embedding = rope.get_emb(int(positions.max()) + 1)
        if isinstance(embedding, tuple):  # YaRN's comes with its scale
            return embedding[0][positions], *embedding[1:]
        return embedding[positions]

    rope.forward = forward
    try:
        yield
    finally:
        del rope.forward
