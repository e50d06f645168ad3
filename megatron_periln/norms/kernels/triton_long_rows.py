"""The kernels of `triton_kernels` for rows that registers can't hold: ``block`` columns at a time.

Each row is read again for each pass over it, from the caches; parameters' partial sums stay in
memory. Arguments and results are those of `triton_kernels`, with one row a tile, and partials that
start at zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_periln.norms.kernels.triton_rows import is_kept, load_rows, load_vector, store_rows

__all__ = ["long_norm_add_backward", "long_norm_add_forward"]


@triton.jit
def _load_biased(
    branch: tl.tensor,
    bias: tl.tensor,
    row: tl.tensor,
    columns: tl.tensor,
    stride: tl.tensor,
    hidden: tl.constexpr,
    wide: tl.constexpr,
) -> tl.tensor:
    x = load_rows(branch, row, columns, stride, (columns < hidden)[None, :], wide)
    if bias is not None:
        x += load_vector(bias, columns, hidden, wide)
    return x


@triton.jit
def long_norm_add_forward(
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
    """Write ``out`` and each row's ``mean`` and ``rstd``; program ``i`` does row ``i``."""
    row = tl.program_id(0) + tl.arange(0, 1)
    m = tl.zeros((1,), wide)
    if mean is not None:
        total = tl.zeros((1, block), wide)
        for start in tl.range(0, hidden, block):
            columns = start + tl.arange(0, block)
            total += _load_biased(branch, bias, row, columns, branch_stride, hidden, wide)
        m = tl.sum(total, 1) / hidden
        tl.store(mean + row, m)
    squares = tl.zeros((1, block), wide)
    for start in tl.range(0, hidden, block):
        columns = start + tl.arange(0, block)
        x = _load_biased(branch, bias, row, columns, branch_stride, hidden, wide) - m[:, None]
        squares += tl.where((columns < hidden)[None, :], x * x, 0.0)
    r = tl.rsqrt(tl.sum(squares, 1) / hidden + eps)
    tl.store(rstd + row, r)
    for start in tl.range(0, hidden, block):
        columns = start + tl.arange(0, block)
        mask = (columns < hidden)[None, :]
        x = _load_biased(branch, bias, row, columns, branch_stride, hidden, wide) - m[:, None]
        y = x * r[:, None] * (load_vector(gain, columns, hidden, wide) + gain_offset)
        if shift is not None:
            y += load_vector(shift, columns, hidden, wide)
        if seed is not None:
            y = tl.where(is_kept(seed, row, columns, dropout), y * dropout_scale, 0.0)
        stream = load_rows(residual, row, columns, residual_stride, mask, wide)
        store_rows(out, row, columns, hidden, mask, stream + y)


@triton.jit
def _load_normed(
    branch: tl.tensor,
    bias: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    row: tl.tensor,
    columns: tl.tensor,
    stride: tl.tensor,
    hidden: tl.constexpr,
    wide: tl.constexpr,
) -> tl.tensor:
    x = _load_biased(branch, bias, row, columns, stride, hidden, wide)
    if mean is not None:
        x -= tl.load(mean + row)[:, None]
    return x * tl.load(rstd + row)[:, None]


@triton.jit
def _load_gradient(
    grad_out: tl.tensor,
    seed: tl.tensor,
    row: tl.tensor,
    columns: tl.tensor,
    stride: tl.tensor,
    dropout: tl.tensor,
    dropout_scale: tl.tensor,
    hidden: tl.constexpr,
    wide: tl.constexpr,
) -> tl.tensor:
    grad = load_rows(grad_out, row, columns, stride, (columns < hidden)[None, :], wide)
    if seed is not None:
        grad = tl.where(is_kept(seed, row, columns, dropout), grad * dropout_scale, 0.0)
    return grad


@triton.jit
def _accumulate(partials: tl.tensor, columns: tl.tensor, hidden: tl.constexpr, values: tl.tensor) -> None:
    """Add ``values`` ``[1, columns]`` to this program's partial sums."""
    pointers = partials + tl.program_id(0).to(tl.int64) * hidden + columns[None, :]
    mask = (columns < hidden)[None, :]
    tl.store(pointers, tl.load(pointers, mask=mask, other=0.0) + values, mask=mask)


@triton.jit
def long_norm_add_backward(
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
    """Write ``grad_branch``; program ``i`` adds to row ``i`` of the partials ``[programs, hidden]``."""
    for index in tl.range(tl.program_id(0), n_rows, tl.num_programs(0)):
        row = index + tl.arange(0, 1)
        products = tl.zeros((1, block), wide)
        weights = tl.zeros((1, block), wide)
        for start in tl.range(0, hidden, block):
            columns = start + tl.arange(0, block)
            normed = _load_normed(branch, bias, mean, rstd, row, columns, branch_stride, hidden, wide)
            grad = _load_gradient(
                grad_out, seed, row, columns, grad_stride, dropout, dropout_scale, hidden, wide
            )
            weighted = grad * (load_vector(gain, columns, hidden, wide) + gain_offset)
            products += weighted * normed
            weights += weighted
        correlation = (tl.sum(products, 1) / hidden)[:, None]
        average = (tl.sum(weights, 1) / hidden)[:, None]
        for start in tl.range(0, hidden, block):
            columns = start + tl.arange(0, block)
            normed = _load_normed(branch, bias, mean, rstd, row, columns, branch_stride, hidden, wide)
            grad = _load_gradient(
                grad_out, seed, row, columns, grad_stride, dropout, dropout_scale, hidden, wide
            )
            grad_x = grad * (load_vector(gain, columns, hidden, wide) + gain_offset) - normed * correlation
            if mean is not None:
                grad_x -= average
            grad_x *= tl.load(rstd + row)[:, None]
            store_rows(grad_branch, row, columns, hidden, (columns < hidden)[None, :], grad_x)
            if gain_partials is not None:
                _accumulate(gain_partials, columns, hidden, grad * normed)
            if shift_partials is not None:
                _accumulate(shift_partials, columns, hidden, grad)
            if bias_partials is not None:
                _accumulate(bias_partials, columns, hidden, grad_x)
        tl.debug_barrier()  # the next row's threads read these sums
