"""How the fused kernels cut up rows of a given length, and which of them that takes."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from megatron_periln.norms.kernels import triton_kernels, triton_long_rows

__all__ = [
    "MAX_HIDDEN_SIZE",
    "Launch",
    "backward_kernel",
    "forward_kernel",
    "is_whole",
    "joined_launch",
    "launch",
]

MAX_HIDDEN_SIZE = 16384  # the longest row that the kernels are tested with

_LONGEST_IN_REGISTERS = 8192  # columns of plain RMSNorm; beyond, registers spill to memory
_PART = 4096  # columns that are read at a time of longer rows
_TILE = 2048  # elements of a tile, where a row is shorter
_ELEMENTS_PER_THREAD = 16  # two 16-byte accesses of bf16
_WARPS_PER_SM = 16  # of the backward grid: enough loads in flight to cover the latency of memory


class Launch(NamedTuple):
    """How rows of a given length are cut up.

    Attributes
    ----------
    block
        Columns of a tile, a power of two: all of a row's, or a part of a long row's.
    tile_rows
        Rows of a tile.
    num_warps
        Warps of a program.
    programs_per_sm
        Programs that the backward grid gives each multiprocessor.
    stages
        Tiles that a program of the backward grid has under way; more than one takes shared memory.
    """

    block: int
    tile_rows: int
    num_warps: int
    programs_per_sm: int
    stages: int = 1


@functools.cache
def launch(hidden_size: int, plain: bool = True) -> Launch:
    """Return how rows of ``hidden_size`` are cut up so that registers suffice.

    ``plain`` is RMSNorm without bias and dropout, which needs the fewest. The limits are those
    that benchmarks/kernel_resources.py finds.
    """
    longest = _LONGEST_IN_REGISTERS if plain else _LONGEST_IN_REGISTERS // 2
    if hidden_size > longest:
        return Launch(_PART, 1, 8 if plain else 16, 2)
    block = 1 << (hidden_size - 1).bit_length()
    tile_rows = max(1, _TILE // block)
    num_warps = block * tile_rows // (32 * _ELEMENTS_PER_THREAD)
    return Launch(block, tile_rows, num_warps, max(2, _WARPS_PER_SM // num_warps))


@functools.cache
def joined_launch(hidden_size: int) -> Launch:
    """Return how rows are cut up for the kernels that also do the next norm.

    They hold twice the tiles, so twice the warps share them.
    """
    shape = launch(hidden_size)
    warps = 2 * shape.num_warps
    return shape._replace(num_warps=warps, programs_per_sm=max(1, _WARPS_PER_SM // warps))


def is_whole(shape: Launch, hidden_size: int) -> bool:
    """Tell whether a tile holds whole rows."""
    return shape.block >= hidden_size


def forward_kernel(shape: Launch, hidden_size: int) -> Any:
    """Return the forward kernel for rows cut up like ``shape``."""
    if is_whole(shape, hidden_size):
        return triton_kernels.norm_add_forward
    return triton_long_rows.long_norm_add_forward


def backward_kernel(shape: Launch, hidden_size: int) -> Any:
    """Return the backward kernel for rows cut up like ``shape``."""
    if is_whole(shape, hidden_size):
        return triton_kernels.norm_add_backward
    return triton_long_rows.long_norm_add_backward
