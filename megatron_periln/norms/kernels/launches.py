"""How the fused kernels cut up rows of a given length, and how they are launched."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from megatron_periln.norms.kernels import triton_kernels, triton_long_rows

__all__ = [
    "MAX_HIDDEN_SIZE",
    "Launch",
    "as_rows",
    "backward_kernel",
    "constants",
    "device_of",
    "forward_kernel",
    "is_whole",
    "joined_launch",
    "launch",
    "sum_partials",
    "tiles",
]

MAX_HIDDEN_SIZE = 16384  # the longest row that the kernels are tested with

_LONGEST_IN_REGISTERS = 8192  # columns of plain RMSNorm; beyond, registers spill to memory
_PART = 4096  # columns that are read at a time of longer rows
_TILE = 2048  # elements of a tile, where a row is shorter
_ELEMENTS_PER_THREAD = 16  # two 16-byte accesses of bf16
_SUM_TILE = (64, 16)  # partial sums, columns
_TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}
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


def as_rows(tensor: Tensor) -> Tensor:
    """View ``[..., hidden]`` as ``[rows, hidden]`` whose rows are contiguous, copying only where it must."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def tiles(length: int, tile: int) -> int:
    """Return how many tiles cover a length."""
    return -(-length // tile)


def constants(shape: Launch, hidden: int, gain_offset: float, wide: torch.dtype) -> dict[str, Any]:
    """Return what is compiled into a kernel, forward and backward."""
    return {
        "gain_offset": gain_offset,
        "hidden": hidden,
        "block": shape.block,
        "tile_rows": shape.tile_rows,
        "wide": _TRITON_DTYPE[wide],
        "num_warps": shape.num_warps,
        "enable_fp_fusion": True,
    }


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make a tensor's GPU the one that kernels are launched on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def sum_partials(partials: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Sum ``[kinds, programs, hidden]`` over programs, in a fixed order."""
    kinds, programs, hidden = partials.shape
    sums = torch.empty(kinds, hidden, dtype=dtype, device=partials.device)
    if kinds:
        tile_rows, tile_columns = _SUM_TILE
        triton_kernels.sum_partials[(tiles(hidden, tile_columns), kinds)](
            partials,
            sums,
            programs,
            hidden,
            tile_rows=tile_rows,
            tile_columns=tile_columns,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return sums.unbind()
