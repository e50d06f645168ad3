"""What the Triton kernels share: reading and writing tiles of rows, dropout, and sums over programs."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "SUM_TILE",
    "is_kept",
    "load_rows",
    "load_scale",
    "load_vector",
    "store_rows",
    "store_sums_of_all",
    "sum_partials",
]

SUM_TILE = {"tile_rows": 64, "tile_columns": 16}


@triton.jit
def load_rows(
    pointer: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    stride: tl.tensor,
    mask: tl.tensor,
    compute_dtype: tl.constexpr,
) -> tl.tensor:
    """Read ``[rows, columns]`` of a matrix with a row stride; 0 where ``mask`` is False."""
    # In int64: 2^31 elements are 131,072 rows of 16,384, fewer than a long sequence and a batch can have.
    offsets = rows[:, None].to(tl.int64) * stride + columns[None, :]
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(compute_dtype)


@triton.jit
def store_rows(
    pointer: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    stride: tl.tensor,
    mask: tl.tensor,
    value: tl.tensor,
) -> None:
    """Write ``[rows, columns]`` of a matrix with a row stride, in its dtype."""
    offsets = rows[:, None].to(tl.int64) * stride + columns[None, :]
    tl.store(pointer + offsets, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_vector(
    pointer: tl.tensor, columns: tl.tensor, hidden: tl.constexpr, compute_dtype: tl.constexpr
) -> tl.tensor:
    """Read a parameter as ``[1, columns]``; 0 beyond ``hidden``."""
    return tl.load(pointer + columns, mask=columns < hidden, other=0.0).to(compute_dtype)[None, :]


@triton.jit
def load_scale(
    pointer: tl.tensor,
    columns: tl.tensor,
    hidden: tl.constexpr,
    per_channel: tl.constexpr,
    compute_dtype: tl.constexpr,
) -> tl.tensor:
    """Read a learned scale: one number, or as ``[1, columns]`` one a channel."""
    if per_channel:
        scale = load_vector(pointer, columns, hidden, compute_dtype)
    else:
        scale = tl.load(pointer).to(compute_dtype)
    return scale


@triton.jit
def store_sums_of_all(sums: tl.tensor, first: tl.tensor, second: tl.tensor) -> None:
    """Write the sums of two tiles, this program's of ``[2, programs]``."""
    pointer = sums + tl.program_id(0)
    tl.store(pointer, tl.sum(tl.sum(first, 0), 0))
    tl.store(pointer + tl.num_programs(0), tl.sum(tl.sum(second, 0), 0))


@triton.jit
def is_kept(seed: tl.tensor, rows: tl.tensor, columns: tl.tensor, dropout: tl.tensor) -> tl.tensor:
    """Tell which elements dropout keeps: a function of the seed, the row and the column alone.

    Philox is a counter-based generator: it hashes the counter (column, row, 0, 0) with the seed as its key.
    So the backward pass draws the forward pass's mask again instead of reading it from memory, whatever the
    tiles of either.
    """
    # Philox takes counters of one shape: `zeros` broadcasts rows and columns to the tile's.
    zeros = (rows[:, None] * 0 + columns[None, :] * 0).to(tl.uint32)
    row = zeros + rows[:, None].to(tl.uint32)
    column = zeros + columns[None, :].to(tl.uint32)
    random, _, _, _ = tl.philox(tl.load(seed), column, row, zeros, zeros)
    return tl.uint_to_uniform_float(random) >= dropout


@triton.jit
def sum_partials(
    partials: tl.tensor,
    sums: tl.tensor,
    count: tl.tensor,
    hidden: tl.tensor,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
) -> None:
    """Sum ``partials`` ``[kinds, count, hidden]`` into ``sums`` ``[kinds, hidden]``, in order.

    A program sums a few columns of one kind, so that there are programs enough; no two add to the same sum.
    """
    columns = tl.program_id(0) * tile_columns + tl.arange(0, tile_columns)
    kind = tl.program_id(1).to(tl.int64)
    total = tl.zeros((tile_rows, tile_columns), partials.dtype.element_ty)
    for start in tl.range(0, count, tile_rows):
        rows = start + tl.arange(0, tile_rows)
        mask = (rows < count)[:, None] & (columns < hidden)[None, :]
        offsets = (kind * count + rows[:, None]) * hidden + columns[None, :]
        total += tl.load(partials + offsets, mask=mask, other=0.0)
    tl.store(
        sums + kind * hidden + columns,
        tl.sum(total, 0).to(sums.dtype.element_ty),
        mask=columns < hidden,
    )
