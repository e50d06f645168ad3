"""Triton kernels of the output norm: bias, norm, dropout and residual add in one pass each way.

With ``x = branch + bias`` and, for each row, ``m = mean(x)`` (0 for RMSNorm),
``r = 1 / sqrt(mean((x - m)²) + eps)`` and ``n = (x - m) r``, the forward pass is
``residual + drop(n gain + shift)``. With ``g`` the gradient of that, dropped likewise, and
``w = g gain``, the backward pass is

    d branch = r (w - n mean(w n) - mean(w))     the last term for LayerNorm only
    d gain = Σ g n,  d shift = Σ g,  d bias = Σ d branch     over all rows

With ``normed``, the sum is also normed by the next norm's parameters, after it is rounded to the dtype of
``out``. Its gradient passes back likewise, and what comes out of it adds to ``grad_out``: their sum is the
gradient of the residual, and the ``g`` above.

An argument that is None takes its part out of the kernel: ``bias``, ``shift``, ``seed`` (no dropout),
``mean`` (RMSNorm), and the partial sums of parameters that need no gradient. ``wide`` is the dtype of the
arithmetic. Rows are ``hidden`` long and read through a row stride; results are contiguous.

These kernels hold whole rows in registers; those of `triton_long_rows` take the rows that don't fit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_periln.norms.kernels.triton_rows import is_kept, load_rows, load_vector, store_rows

__all__ = ["norm_add_backward", "norm_add_forward", "sum_partials"]


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
    next_gain: tl.tensor = None,
    next_shift: tl.tensor = None,
    next_eps: tl.tensor = None,
    normed: tl.tensor = None,
    next_mean: tl.tensor = None,
    next_rstd: tl.tensor = None,
) -> None:
    """Write ``out`` and each row's ``mean`` and ``rstd``; program ``i`` does the ``i``-th tile of rows.

    And ``normed``, if given, with its rows' ``next_mean`` and ``next_rstd``.
    """
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
    total = (stream + y).to(out.dtype.element_ty)
    store_rows(out, rows, columns, hidden, mask, total)
    if normed is not None:
        z = total.to(wide)
        if next_mean is not None:
            m = tl.sum(z, 1) / hidden
            tl.store(next_mean + rows, m, mask=rows < n_rows)
            z = tl.where(mask, z - m[:, None], 0.0)
        r = tl.rsqrt(tl.sum(z * z, 1) / hidden + next_eps)
        tl.store(next_rstd + rows, r, mask=rows < n_rows)
        z = z * r[:, None] * (load_vector(next_gain, columns, hidden, wide) + gain_offset)
        if next_shift is not None:
            z += load_vector(next_shift, columns, hidden, wide)
        store_rows(normed, rows, columns, hidden, mask, z)


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
    grad_normed: tl.tensor = None,
    out: tl.tensor = None,
    next_gain: tl.tensor = None,
    next_mean: tl.tensor = None,
    next_rstd: tl.tensor = None,
    grad_residual: tl.tensor = None,
    next_gain_partials: tl.tensor = None,
    next_shift_partials: tl.tensor = None,
    normed_stride: tl.tensor = None,
) -> None:
    """Write ``grad_branch``, and row ``i`` of the partials ``[programs, hidden]`` from program ``i``.

    Programs walk over the tiles of rows in strides of the grid, so that each parameter's gradient
    is summed in an order that depends on the grid alone. With ``grad_normed``, ``grad_residual`` is
    written too.
    """
    columns = tl.arange(0, block)
    factor = load_vector(gain, columns, hidden, wide) + gain_offset
    gain_sum = tl.zeros((tile_rows, block), wide)
    shift_sum = tl.zeros((tile_rows, block), wide)
    bias_sum = tl.zeros((tile_rows, block), wide)
    next_gain_sum = tl.zeros((tile_rows, block), wide)
    next_shift_sum = tl.zeros((tile_rows, block), wide)
    step = tl.num_programs(0) * tile_rows
    for start in tl.range(tl.program_id(0) * tile_rows, n_rows, step, num_stages=stages):
        rows = start + tl.arange(0, tile_rows)
        mask = (rows < n_rows)[:, None] & (columns < hidden)[None, :]
        grad = load_rows(grad_out, rows, columns, grad_stride, mask, wide)
        if grad_normed is not None:
            above = load_rows(grad_normed, rows, columns, normed_stride, mask, wide)
            z = load_rows(out, rows, columns, hidden, mask, wide)
            if next_mean is not None:
                z -= tl.load(next_mean + rows, mask=rows < n_rows, other=0.0)[:, None]
            next_r = tl.load(next_rstd + rows, mask=rows < n_rows, other=0.0)[:, None]
            z *= next_r
            weighted = above * (load_vector(next_gain, columns, hidden, wide) + gain_offset)
            grad_z = weighted - z * (tl.sum(weighted * z, 1) / hidden)[:, None]
            if next_mean is not None:
                grad_z -= (tl.sum(weighted, 1) / hidden)[:, None]
            grad = tl.where(mask, grad + grad_z * next_r, 0.0)
            store_rows(grad_residual, rows, columns, hidden, mask, grad)
            if next_gain_partials is not None:
                next_gain_sum += above * z
            if next_shift_partials is not None:
                next_shift_sum += above
        x = load_rows(branch, rows, columns, branch_stride, mask, wide)
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
    if next_gain_partials is not None:
        tl.store(next_gain_partials + row + columns, tl.sum(next_gain_sum, 0), mask=columns < hidden)
    if next_shift_partials is not None:
        tl.store(next_shift_partials + row + columns, tl.sum(next_shift_sum, 0), mask=columns < hidden)


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
