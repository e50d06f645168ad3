"""What the Triton kernels share: reading and writing tiles of rows, and dropout."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["is_kept", "load_rows", "load_vector", "store_rows"]


@triton.jit
def load_rows(
    pointer: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    stride: tl.tensor,
    mask: tl.tensor,
    wide: tl.constexpr,
) -> tl.tensor:
    """Read ``[rows, columns]`` of a matrix with a row stride; 0 where ``mask`` is False."""
    offsets = rows[:, None].to(tl.int64) * stride + columns[None, :]
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(wide)


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
    pointer: tl.tensor, columns: tl.tensor, hidden: tl.constexpr, wide: tl.constexpr
) -> tl.tensor:
    """Read a parameter as ``[1, columns]``."""
    return tl.load(pointer + columns, mask=columns < hidden, other=0.0).to(wide)[None, :]


@triton.jit
def is_kept(seed: tl.tensor, rows: tl.tensor, columns: tl.tensor, dropout: tl.tensor) -> tl.tensor:
    """Tell which elements dropout keeps: a function of the seed, the row and the column alone."""
    zeros = (rows[:, None] * 0 + columns[None, :] * 0).to(tl.uint32)
    row = zeros + rows[:, None].to(tl.uint32)
    column = zeros + columns[None, :].to(tl.uint32)
    random, _, _, _ = tl.philox(tl.load(seed), column, row, zeros, zeros)
    return tl.uint_to_uniform_float(random) >= dropout
