"""What attention must not see: the causal mask, a sliding window and the documents, as one mask."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["fold_masks"]


def fold_masks(
    documents: Tensor | None,
    queries: Tensor,
    num_keys: int,
    *,
    causal: bool,
    window: tuple[int, int] | None = None,
) -> Tensor | None:
    """Return one mask, True where a query must not see a key; None where every query sees all.

    Parameters
    ----------
    documents
        The mask that attention is given, ``[batch, 1, queries, keys]``, True where masked; None for none.
    queries
        The queries' positions in the sequence, ``[queries]``. The keys' are ``0 ... num_keys - 1``.
    num_keys
        The length of the sequence.
    causal
        Whether queries see no later keys, whatever the window says.
    window
        Megatron's ``--window-size``: how many keys before a query and how many after it are seen beside
        its own, each -1 for all.
    """
    left, right = window or (-1, -1)
    if causal:
        right = 0
    keys = torch.arange(num_keys, device=queries.device)
    masked = documents
    for limit, distances in ((left, queries[:, None] - keys), (right, keys - queries[:, None])):
        if limit >= 0:
            outside = distances > limit
            masked = outside if masked is None else masked | outside
    return masked
