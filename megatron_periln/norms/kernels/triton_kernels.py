"""Triton kernels of the output norm: bias, norm, dropout and residual add in one pass each way.

With ``x = branch + bias`` and, for each row, ``m = mean(x)`` (0 for RMSNorm),
``r = 1 / sqrt(mean((x - m)²) + eps)`` and ``n = (x - m) r``, the forward pass is
``residual + drop(n gain + shift)``. With ``g`` the gradient of that, dropped likewise, and
``w = g gain``, the backward pass is

    d branch = r (w - n mean(w n) - mean(w))     the last term for LayerNorm only
    d gain = Σ g n,  d shift = Σ g,  d bias = Σ d branch     over all rows

An argument that is None takes its part out of the kernel: ``bias``, ``shift``, ``seed`` (no dropout),
``mean`` (RMSNorm), and the partial sums of parameters that need no gradient. ``wide`` is the dtype of the
arithmetic. Rows are ``hidden`` long and read through a row stride; results are contiguous.

These kernels hold whole rows in registers; those of `triton_long_rows` take the rows that don't fit.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "is_kept",
    "load_rows",
    "load_vector",
    "norm_add_backward",
    "norm_add_forward",
    "store_rows",
    "sum_partials",
]


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


@triton.jit
def norm_add_forward(
    branch: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    gain: tl.tensor,
    shift: tl.tensor,
    seed: tl.tensor,
    out: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    n_rows: tl.tensor,
    branch_stride: tl.tensor,
    residual_stride: tl.tensor,
    eps: tl.tensor,
    dropout: tl.tensor,
    dropout_scale: tl.tensor,
    gain_offset: tl.constexpr,
    hidden: tl.constexpr,
    block: tl.constexpr,
    tile_rows: tl.constexpr,
    wide: tl.constexpr,
) -> None:
    """Write ``out`` and each row's ``mean`` and ``rstd``; program ``i`` does the ``i``-th tile of rows."""
    rows = tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)
    columns = tl.arange(0, block)
    mask = (rows < n_rows)[:, None] & (columns < hidden)[None, :]
    x = load_rows(branch, rows, columns, branch_stride, mask, wide)
    stream = load_rows(residual, rows, columns, residual_stride, mask, wide)
    if bias is not None:
        x += load_vector(bias, columns, hidden, wide)
    if mean is not None:
        m = tl.sum(x, 1) / hidden
        tl.store(mean + rows, m, mask=rows < n_rows)
        x = tl.where(mask, x - m[:, None], 0.0)
    r = tl.rsqrt(tl.sum(x * x, 1) / hidden + eps)
    tl.store(rstd + rows, r, mask=rows < n_rows)
    y = x * r[:, None] * (load_vector(gain, columns, hidden, wide) + gain_offset)
    if shift is not None:
        y += load_vector(shift, columns, hidden, wide)
    if seed is not None:
        y = tl.where(is_kept(seed, rows, columns, dropout), y * dropout_scale, 0.0)
    store_rows(out, rows, columns, hidden, mask, stream + y)


@triton.jit
def norm_add_backward(
    grad_out: tl.tensor,
    branch: tl.tensor,
    bias: tl.tensor,
    gain: tl.tensor,
    seed: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    grad_branch: tl.tensor,
    gain_partials: tl.tensor,
    shift_partials: tl.tensor,
    bias_partials: tl.tensor,
    n_rows: tl.tensor,
    grad_stride: tl.tensor,
    branch_stride: tl.tensor,
    dropout: tl.tensor,
    dropout_scale: tl.tensor,
    gain_offset: tl.constexpr,
    hidden: tl.constexpr,
    block: tl.constexpr,
    tile_rows: tl.constexpr,
    wide: tl.constexpr,
    stages: tl.constexpr,
) -> None:
    """Write ``grad_branch``, and row ``i`` of the partials ``[programs, hidden]`` from program ``i``.

    Programs walk over the tiles of rows in strides of the grid, so that each parameter's gradient
    is summed in an order that depends on the grid alone.
    """
    columns = tl.arange(0, block)
    factor = load_vector(gain, columns, hidden, wide) + gain_offset
    gain_sum = tl.zeros((tile_rows, block), wide)
    shift_sum = tl.zeros((tile_rows, block), wide)
    bias_sum = tl.zeros((tile_rows, block), wide)
    step = tl.num_programs(0) * tile_rows
    for start in tl.range(tl.program_id(0) * tile_rows, n_rows, step, num_stages=stages):
        rows = start + tl.arange(0, tile_rows)
        mask = (rows < n_rows)[:, None] & (columns < hidden)[None, :]
        x = load_rows(branch, rows, columns, branch_stride, mask, wide)
        grad = load_rows(grad_out, rows, columns, grad_stride, mask, wide)
        r = tl.load(rstd + rows, mask=rows < n_rows, other=0.0)[:, None]
        if bias is not None:
            x += load_vector(bias, columns, hidden, wide)
        if mean is not None:
            x -= tl.load(mean + rows, mask=rows < n_rows, other=0.0)[:, None]
        if seed is not None:
            grad = tl.where(is_kept(seed, rows, columns, dropout), grad * dropout_scale, 0.0)
        normed = x * r
        weighted = grad * factor
        grad_x = weighted - normed * (tl.sum(weighted * normed, 1) / hidden)[:, None]
        if mean is not None:
            grad_x -= (tl.sum(weighted, 1) / hidden)[:, None]
        grad_x *= r
        store_rows(grad_branch, rows, columns, hidden, mask, grad_x)
        if gain_partials is not None:
            gain_sum += grad * normed
        if shift_partials is not None:
            shift_sum += grad
        if bias_partials is not None:
            bias_sum += grad_x
    row = tl.program_id(0).to(tl.int64) * hidden
    if gain_partials is not None:
        tl.store(gain_partials + row + columns, tl.sum(gain_sum, 0), mask=columns < hidden)
    if shift_partials is not None:
        tl.store(shift_partials + row + columns, tl.sum(shift_sum, 0), mask=columns < hidden)
    if bias_partials is not None:
        tl.store(bias_partials + row + columns, tl.sum(bias_sum, 0), mask=columns < hidden)


@triton.jit
def sum_partials(
    partials: tl.tensor,
    sums: tl.tensor,
    count: tl.tensor,
    hidden: tl.tensor,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
) -> None:
    """Sum ``partials`` ``[kinds, count, hidden]`` into ``sums`` ``[kinds, hidden]``, in order."""
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
