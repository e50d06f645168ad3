"""The kernels of `fused` for rows that registers can't hold: ``block`` columns at a time.

Arguments, results and formulas are those of `fused`, with one row a tile, without the next norm, and with
partial sums that start at zero. Each row is read again for each pass over it, from the caches; the partial
sums of the parameters' gradients, as long as a row, stay in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_periln.norms.kernels.triton_rows import (
    is_kept,
    load_rows,
    load_scale,
    load_vector,
    store_rows,
    store_sums_of_all,
)

__all__ = ["long_norm_add_backward", "long_norm_add_forward"]


@triton.jit
def long_norm_add_forward(
    sublayer_output: tl.tensor,
    sublayer_bias: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    seed: tl.tensor,
    out: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    next_weight: tl.tensor,
    next_bias: tl.tensor,
    normed: tl.tensor,
    next_mean: tl.tensor,
    next_rstd: tl.tensor,
    residual_scales: tl.tensor,
    output_scales: tl.tensor,
    n_rows: tl.tensor,
    sublayer_output_stride: tl.tensor,
    residual_stride: tl.tensor,
    eps: tl.tensor,
    next_eps: tl.tensor,
    dropout: tl.tensor,
    dropout_scale: tl.tensor,
    residual_scale: tl.tensor,
    output_scale: tl.tensor,
    scales_per_channel: tl.constexpr,
    weight_offset: tl.constexpr,
    hidden: tl.constexpr,
    block: tl.constexpr,
    tile_rows: tl.constexpr,
    compute_dtype: tl.constexpr,
) -> None:
    """Write ``out`` and each row's ``mean`` and ``rstd``; program ``i`` does row ``i``."""
    row = tl.program_id(0) + tl.arange(0, 1)
    m = tl.zeros((1,), compute_dtype)
    # The first pass: mean = Σ x / hidden. Parts are added to one another, and across threads only once.
    if mean is not None:
        total = tl.zeros((1, block), compute_dtype)
        for start in tl.range(0, hidden, block):
            columns = start + tl.arange(0, block)
            total += _load_x(
                sublayer_output, sublayer_bias, row, columns, sublayer_output_stride, hidden, compute_dtype
            )
        m = tl.sum(total, 1) / hidden
        tl.store(mean + row, m)
    # The second: rstd = 1 / sqrt(Σ (x - mean)² / hidden + eps), of differences, as Σ x² - mean² would cancel.
    squares = tl.zeros((1, block), compute_dtype)
    for start in tl.range(0, hidden, block):
        columns = start + tl.arange(0, block)
        x = _load_x(
            sublayer_output, sublayer_bias, row, columns, sublayer_output_stride, hidden, compute_dtype
        )
        x -= m[:, None]
        squares += tl.where((columns < hidden)[None, :], x * x, 0.0)  # beyond `hidden`, x is -mean
    r = tl.rsqrt(tl.sum(squares, 1) / hidden + eps)
    tl.store(rstd + row, r)
    # The third: out = a residual + b dropout(x̂ weight + bias).
    for start in tl.range(0, hidden, block):
        columns = start + tl.arange(0, block)
        mask = (columns < hidden)[None, :]
        x = _load_x(
            sublayer_output, sublayer_bias, row, columns, sublayer_output_stride, hidden, compute_dtype
        )
        x -= m[:, None]
        y = x * r[:, None] * (load_vector(weight, columns, hidden, compute_dtype) + weight_offset)
        if bias is not None:
            y += load_vector(bias, columns, hidden, compute_dtype)
        if seed is not None:
            y = tl.where(is_kept(seed, row, columns, dropout), y * dropout_scale, 0.0)
        if output_scale is not None:
            y *= output_scale
        stream = load_rows(residual, row, columns, residual_stride, mask, compute_dtype)
        if residual_scale is not None:
            stream *= residual_scale
        if output_scales is not None:
            y *= load_scale(output_scales, columns, hidden, scales_per_channel, compute_dtype)
            stream *= load_scale(residual_scales, columns, hidden, scales_per_channel, compute_dtype)
        store_rows(out, row, columns, hidden, mask, stream + y)


@triton.jit
def long_norm_add_backward(
    grad_out: tl.tensor,
    sublayer_output: tl.tensor,
    sublayer_bias: tl.tensor,
    weight: tl.tensor,
    seed: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    grad_sublayer_output: tl.tensor,
    grad_normed: tl.tensor,
    out: tl.tensor,
    next_weight: tl.tensor,
    next_mean: tl.tensor,
    next_rstd: tl.tensor,
    grad_residual: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    residual_scales: tl.tensor,
    output_scales: tl.tensor,
    scale_partials: tl.tensor,
    sublayer_bias_partials: tl.tensor,
    weight_partials: tl.tensor,
    bias_partials: tl.tensor,
    next_weight_partials: tl.tensor,
    next_bias_partials: tl.tensor,
    n_rows: tl.tensor,
    grad_out_stride: tl.tensor,
    sublayer_output_stride: tl.tensor,
    grad_normed_stride: tl.tensor,
    residual_stride: tl.tensor,
    dropout: tl.tensor,
    dropout_scale: tl.tensor,
    residual_scale: tl.tensor,
    output_scale: tl.tensor,
    scales_per_channel: tl.constexpr,
    weight_offset: tl.constexpr,
    hidden: tl.constexpr,
    block: tl.constexpr,
    tile_rows: tl.constexpr,
    compute_dtype: tl.constexpr,
    stages: tl.constexpr,
) -> None:
    """Write ``grad_sublayer_output``; program ``i`` adds to row ``i`` of the sums ``[programs, hidden]``."""
    residual_scale_sum = tl.zeros((1, block), compute_dtype)
    output_scale_sum = tl.zeros((1, block), compute_dtype)
    # In strides of the grid, for the order of the sums: see `norm_add_backward`.
    for index in tl.range(tl.program_id(0), n_rows, tl.num_programs(0)):
        row = index + tl.arange(0, 1)
        # The first pass, with g the gradient of out, dropped, times b; h = g weight; mean(h x̂) and mean(h).
        products = tl.zeros((1, block), compute_dtype)
        weights = tl.zeros((1, block), compute_dtype)
        for start in tl.range(0, hidden, block):
            columns = start + tl.arange(0, block)
            normalized = _load_normalized(
                sublayer_output,
                sublayer_bias,
                mean,
                rstd,
                row,
                columns,
                sublayer_output_stride,
                hidden,
                compute_dtype,
            )
            grad = load_rows(
                grad_out, row, columns, grad_out_stride, (columns < hidden)[None, :], compute_dtype
            )
            grad = _of_output(grad, seed, row, columns, dropout, dropout_scale, output_scale)
            if output_scales is not None:
                grad *= load_scale(output_scales, columns, hidden, scales_per_channel, compute_dtype)
            weighted = grad * (load_vector(weight, columns, hidden, compute_dtype) + weight_offset)
            products += weighted * normalized
            weights += weighted
        mean_product = (tl.sum(products, 1) / hidden)[:, None]
        mean_weighted = (tl.sum(weights, 1) / hidden)[:, None]
        # The second: d x = rstd (h - x̂ mean(h x̂) - mean(h)), and this row's part of Σ g x̂, Σ g and Σ d x.
        for start in tl.range(0, hidden, block):
            columns = start + tl.arange(0, block)
            normalized = _load_normalized(
                sublayer_output,
                sublayer_bias,
                mean,
                rstd,
                row,
                columns,
                sublayer_output_stride,
                hidden,
                compute_dtype,
            )
            grad = load_rows(
                grad_out, row, columns, grad_out_stride, (columns < hidden)[None, :], compute_dtype
            )
            if residual_scale is not None:
                store_rows(
                    grad_residual, row, columns, hidden, (columns < hidden)[None, :], grad * residual_scale
                )
            if residual_scales is not None:
                a = load_scale(residual_scales, columns, hidden, scales_per_channel, compute_dtype)
                store_rows(grad_residual, row, columns, hidden, (columns < hidden)[None, :], grad * a)
            factor = load_vector(weight, columns, hidden, compute_dtype) + weight_offset
            if scale_partials is not None:
                stream = load_rows(
                    residual, row, columns, residual_stride, (columns < hidden)[None, :], compute_dtype
                )
                of_residual = grad * stream  # d a = Σ (gradient of out) residual
            grad = _of_output(grad, seed, row, columns, dropout, dropout_scale, output_scale)
            if scale_partials is not None:
                y = normalized * factor
                if bias is not None:
                    y += load_vector(bias, columns, hidden, compute_dtype)
                of_output = grad * y  # d b = Σ (gradient of out, dropped) (x̂ weight + bias)
                if scales_per_channel:
                    _accumulate(scale_partials, columns, hidden, of_residual)
                    second = tl.num_programs(0).to(tl.int64) * hidden
                    _accumulate(scale_partials + second, columns, hidden, of_output)
                else:
                    residual_scale_sum += of_residual
                    output_scale_sum += of_output
            if output_scales is not None:
                grad *= load_scale(output_scales, columns, hidden, scales_per_channel, compute_dtype)
            weighted = grad * factor
            grad_x = weighted - normalized * mean_product
            if mean is not None:
                grad_x -= mean_weighted
            grad_x *= tl.load(rstd + row)[:, None]
            store_rows(grad_sublayer_output, row, columns, hidden, (columns < hidden)[None, :], grad_x)
            if weight_partials is not None:
                _accumulate(weight_partials, columns, hidden, grad * normalized)
            if bias_partials is not None:
                _accumulate(bias_partials, columns, hidden, grad)
            if sublayer_bias_partials is not None:
                _accumulate(sublayer_bias_partials, columns, hidden, grad_x)
        # The next row adds to the same sums: what any thread has written must be there for all to read.
        tl.debug_barrier()
    if scale_partials is not None and not scales_per_channel:
        store_sums_of_all(scale_partials, residual_scale_sum, output_scale_sum)


@triton.jit
def _load_x(
    sublayer_output: tl.tensor,
    sublayer_bias: tl.tensor,
    row: tl.tensor,
    columns: tl.tensor,
    stride: tl.tensor,
    hidden: tl.constexpr,
    compute_dtype: tl.constexpr,
) -> tl.tensor:
    """Read ``x = sublayer_output + sublayer_bias``; 0 beyond ``hidden``."""
    x = load_rows(sublayer_output, row, columns, stride, (columns < hidden)[None, :], compute_dtype)
    if sublayer_bias is not None:
        x += load_vector(sublayer_bias, columns, hidden, compute_dtype)
    return x


@triton.jit
def _load_normalized(
    sublayer_output: tl.tensor,
    sublayer_bias: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    row: tl.tensor,
    columns: tl.tensor,
    stride: tl.tensor,
    hidden: tl.constexpr,
    compute_dtype: tl.constexpr,
) -> tl.tensor:
    """Read ``x``, and return ``x̂ = (x - mean) rstd``."""
    x = _load_x(sublayer_output, sublayer_bias, row, columns, stride, hidden, compute_dtype)
    if mean is not None:
        x -= tl.load(mean + row)[:, None]
    return x * tl.load(rstd + row)[:, None]


@triton.jit
def _of_output(
    grad: tl.tensor,
    seed: tl.tensor,
    row: tl.tensor,
    columns: tl.tensor,
    dropout: tl.tensor,
    dropout_scale: tl.tensor,
    output_scale: tl.tensor,
) -> tl.tensor:
    """Return ``g`` of the gradient of ``out``: dropped where the forward pass dropped, and times ``b``."""
    if seed is not None:
        grad = tl.where(is_kept(seed, row, columns, dropout), grad * dropout_scale, 0.0)
    if output_scale is not None:
        grad *= output_scale
    return grad


@triton.jit
def _accumulate(partials: tl.tensor, columns: tl.tensor, hidden: tl.constexpr, values: tl.tensor) -> None:
    """Add ``values`` ``[1, columns]`` to this program's partial sums."""
    pointers = partials + tl.program_id(0).to(tl.int64) * hidden + columns[None, :]
    mask = (columns < hidden)[None, :]
    tl.store(pointers, tl.load(pointers, mask=mask, other=0.0) + values, mask=mask)
