"""How the fused kernels are launched on rows of a given length, and which rows they take."""

from __future__ import annotations

import functools
from typing import NamedTuple

__all__ = [
    "MAX_NORM_ADD_HIDDEN_SIZE",
    "MAX_NORM_ADD_NORM_HIDDEN_SIZE",
    "LaunchConfig",
    "choose_launch_config",
]

MAX_NORM_ADD_HIDDEN_SIZE = 16384  # the longest row that the kernels are tested with
MAX_NORM_ADD_NORM_HIDDEN_SIZE = 4096  # with the next norm: rows that fit the registers twice

_LONGEST_IN_REGISTERS = 8192  # columns of plain RMSNorm; beyond, registers spill to memory
_PART = 4096  # columns that are read at a time of longer rows
_TILE = 2048  # elements of a tile, where a row is shorter
_ELEMENTS_PER_THREAD = 16  # two 16-byte accesses of bf16
_WARPS_PER_SM = 16  # of the backward grid: enough loads in flight to cover the latency of memory


class LaunchConfig(NamedTuple):
    """How the kernels are launched on rows of a given length.

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
def choose_launch_config(hidden_size: int, plain: bool = True, with_next: bool = False) -> LaunchConfig:
    """Return the launch config with which rows of ``hidden_size`` fit the registers.

    The limits are those that benchmarks/kernel_resources.py finds.

    Parameters
    ----------
    plain
        RMSNorm without sublayer bias and dropout, which needs the fewest registers.
    with_next
        With the next norm: such kernels hold twice the tiles, so twice the warps share them.
    """
    longest = _LONGEST_IN_REGISTERS if plain else _LONGEST_IN_REGISTERS // 2
    if hidden_size > longest:
        return LaunchConfig(_PART, 1, 8 if plain else 16, 2)
    block = 1 << (hidden_size - 1).bit_length()
    tile_rows = max(1, _TILE // block)  # short rows share a program, so that it has as many loads in flight
    num_warps = block * tile_rows // (32 * _ELEMENTS_PER_THREAD) * (2 if with_next else 1)
    programs_per_sm = max(1 if with_next else 2, _WARPS_PER_SM // num_warps)
    return LaunchConfig(block, tile_rows, num_warps, programs_per_sm)
