"""The order of rows in Megatron's and in transformers' attention weights."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_periln.convert.architecture import Architecture

__all__ = ["interleave", "join_qkv", "separate", "split_qkv"]


def split_qkv(fused: Tensor, architecture: Architecture) -> tuple[Tensor, Tensor, Tensor]:
    """Split Megatron's ``linear_qkv`` into queries, keys and values.

    Parameters
    ----------
    fused
        The weight ``[(heads + 2 * kv_heads) * head_dim, hidden]``, or the bias without its last
        dimension: for each key-value head the queries it serves, its key, its value
        (megatron/core/transformer/attention.py).
    architecture
        Gives the numbers of heads.
    """
    kv_heads, head_dim = architecture.num_kv_heads, architecture.head_dim
    groups = fused.unflatten(0, (kv_heads, -1, head_dim))
    q, k, v = groups.split([architecture.num_heads // kv_heads, 1, 1], dim=1)
    return q.flatten(0, 2), k.flatten(0, 2), v.flatten(0, 2)


def join_qkv(q: Tensor, k: Tensor, v: Tensor, architecture: Architecture) -> Tensor:
    """Undo `split_qkv`."""
    kv_heads, head_dim = architecture.num_kv_heads, architecture.head_dim
    groups = [part.unflatten(0, (kv_heads, -1, head_dim)) for part in (q, k, v)]
    return torch.cat(groups, dim=1).flatten(0, 2)


def interleave(rows: Tensor, architecture: Architecture) -> Tensor:
    """Make neighbours of the rotary pairs, which are half the rotated channels apart.

    Parameters
    ----------
    rows
        ``[heads * head_dim, ...]``: a weight, bias or gain of queries or keys.
    architecture
        Gives the head's size, and how many of its channels rotate.
    """
    return _reorder(rows, architecture, 2)


def separate(rows: Tensor, architecture: Architecture) -> Tensor:
    """Undo `interleave`."""
    return _reorder(rows, architecture, architecture.rotary_dim // 2)


def _reorder(rows: Tensor, architecture: Architecture, blocks: int) -> Tensor:
    heads = rows.unflatten(0, (-1, architecture.head_dim))
    rotated, rest = heads.tensor_split([architecture.rotary_dim], dim=1)
    rotated = rotated.unflatten(1, (blocks, -1)).transpose(1, 2).flatten(1, 2)
    return torch.cat([rotated, rest], dim=1).flatten(0, 1)
