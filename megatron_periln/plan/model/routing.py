"""Tokens routed evenly over experts, where no router's choice is known: as fake tensors have no values.

Stands in for what token dispatchers read from a routing map: how many tokens go where. What it
does with them is Megatron's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
)
from torch import Tensor

__all__ = ["evenly_routed"]


def _count(dispatcher: Any, routing_map: Tensor) -> Any:
    """Set how many tokens go where, and return how many each local expert gets (``preprocess``)."""
    if dispatcher.drop_and_pad:
        return _padded(dispatcher, routing_map)
    experts, local = dispatcher.num_experts, dispatcher.num_local_experts
    tokens = routing_map.size(0) * dispatcher.config.moe_router_topk
    each = np.full(experts, tokens // experts)
    each[: tokens % experts] += 1  # every rank has its remainder there
    mine = each[dispatcher.local_expert_indices[0] : dispatcher.local_expert_indices[-1] + 1]
    ranks = dispatcher.ep_size * dispatcher.tp_size
    dispatcher.num_out_tokens = tokens
    if ranks > 1:
        dispatcher.input_splits = each.reshape(dispatcher.ep_size, local).sum(axis=1)
        dispatcher.output_splits = np.full(dispatcher.ep_size, mine.sum())
        dispatcher.output_splits_tp = np.full(dispatcher.tp_size, dispatcher.ep_size * mine.sum())
    chunks = np.arange(experts * dispatcher.tp_size)
    dispatcher.sort_input_by_local_experts = chunks.reshape(-1, local).T.ravel()
    dispatcher.restore_output_by_local_experts = chunks.reshape(local, -1).T.ravel()
    dispatcher.num_global_tokens_per_local_expert = np.tile(mine, (ranks, 1))
    return mine * ranks


_padded = MoEAlltoAllTokenDispatcher.preprocess


def _known_here(_: Any, __: str, tokens_per_expert: Any = None) -> Any:
    """Return the numbers, which were never on a GPU (``_maybe_dtoh_and_synchronize``)."""
    return tokens_per_expert


def _permute(
    tokens: Tensor,
    routing_map: Tensor,
    probs: Tensor | None = None,
    num_out_tokens: int | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor | None, Tensor, None, None]:
    """Return as many rows as tokens are sent (``moe_utils.permute``), which keeps their indices."""
    indices = torch.zeros(num_out_tokens or tokens.size(0), dtype=torch.int64)
    chosen = None if probs is None else probs.T.contiguous().view(-1).index_select(0, indices)
    return tokens.index_select(0, indices), chosen, indices, None, None


def _gathered(dispatcher: Any, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Any, Tensor]:
    """Stand for ``MoEAllGatherTokenDispatcher.dispatch_postprocess``, which selects by a mask."""
    dispatcher.hidden_shape_before_permute = hidden_states.shape
    experts = dispatcher.config.num_moe_experts
    tokens = hidden_states.size(0) * dispatcher.config.moe_router_topk
    own = slice(dispatcher.local_expert_indices[0], dispatcher.local_expert_indices[-1] + 1)
    each = np.full(experts, tokens // experts)
    each[: tokens % experts] += 1
    dispatcher.local_map = dispatcher.routing_map[:, own].contiguous()
    rows, chosen, indices, *_ = _permute(
        hidden_states, dispatcher.local_map, probs[:, own].contiguous(), int(each[own].sum())
    )
    assert chosen is not None
    dispatcher.reversed_local_input_permutation_mapping, dispatcher.local_probs = indices, chosen
    dispatcher.routing_map = None
    return rows, each[own], chosen


@contextmanager
def evenly_routed() -> Iterator[None]:
    """Have each expert get as many tokens as any other."""
    changes = {"preprocess": _count, "_maybe_dtoh_and_synchronize": _known_here}
    with ExitStack() as stack:
        for name, change in changes.items():
            stack.enter_context(mock.patch.object(MoEAlltoAllTokenDispatcher, name, change))
        stack.enter_context(mock.patch.object(token_dispatcher, "permute", _permute))
        stack.enter_context(mock.patch.object(MoEAllGatherTokenDispatcher, "dispatch_postprocess", _gathered))
        yield
