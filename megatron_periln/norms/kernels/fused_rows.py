"""The output norm's kernels for rows that registers hold: forward and backward, or with the next norm.

With ``x = sublayer_output + sublayer_bias`` and, for each row,

    mean = Σ x / hidden                              0 for RMSNorm
    rstd = 1 / sqrt(Σ (x - mean)² / hidden + eps)
    x̂ = (x - mean) rstd

the forward pass is ``out = a residual + b dropout(x̂ weight + bias)``. With ``g`` the gradient of ``out``,
times ``b`` and dropped likewise, and ``h = g weight``, the backward pass is

    d sublayer_output = rstd (h - x̂ mean(h x̂) - mean(h))      the last term for LayerNorm only
    d weight = Σ g x̂,   d bias = Σ g,   d sublayer_bias = Σ d sublayer_output      over all rows
    d residual = a times the gradient of out, which is not written where a is 1

Where ``a`` and ``b`` are learned, of one number each or of one a channel,

    d a = Σ (gradient of out) residual
    d b = Σ (gradient of out, dropped) (x̂ weight + bias) = weight (Σ g x̂) / b + bias (Σ g) / b

over all rows, and over channels if they are numbers. So the sums for ``weight`` and ``bias`` give that of
``b``, taken before ``b`` is multiplied with; that of ``a`` has the stream read again.

The next norm, which only the residual add divides from this one, reads ``out`` while it is at hand. Backward,
what passes through it is the same formula, and adds to the gradient of ``out``.

`fused_long_rows` has the kernels for rows that don't fit. In both an argument that is None
(``sublayer_bias``, ``bias``, ``seed`` without dropout, ``mean`` for RMSNorm, ``a`` and ``b`` as numbers or
as tensors, both where they are 1, what belongs to the next norm, the sums of parameters that need no
gradient) is a constant to the compiler, which leaves out what is done with it: one source makes a kernel for
each combination, and none asks at run time. Tensors come first, in the order in which `plans` gives their
addresses.
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

__all__ = ["norm_add_backward", "norm_add_forward"]


@triton.jit
def norm_add_forward(
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
    """Write ``out`` and each row's ``mean`` and ``rstd``; program ``i`` does the ``i``-th tile of rows.

    And ``normed``, if given, with its rows' ``next_mean`` and ``next_rstd``.
    """
    rows = tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)
    columns = tl.arange(0, block)  # a power of two; those from `hidden` on are masked, and 0 when loaded
    mask = (rows < n_rows)[:, None] & (columns < hidden)[None, :]
    x = load_rows(sublayer_output, rows, columns, sublayer_output_stride, mask, compute_dtype)
    # Read before it is needed, so that both loads are in flight together.
    stream = load_rows(residual, rows, columns, residual_stride, mask, compute_dtype)
    if sublayer_bias is not None:
        x += load_vector(sublayer_bias, columns, hidden, compute_dtype)
    if mean is not None:
        m = tl.sum(x, 1) / hidden  # mean = Σ x / hidden
        tl.store(mean + rows, m, mask=rows < n_rows)
        x = tl.where(mask, x - m[:, None], 0.0)  # masked columns would be -mean, and count in the variance
    r = tl.rsqrt(tl.sum(x * x, 1) / hidden + eps)  # rstd = 1 / sqrt(Σ (x - mean)² / hidden + eps)
    tl.store(rstd + rows, r, mask=rows < n_rows)
    # y = x̂ weight + bias; `weight_offset` is 1 with zero-centered gamma
    y = x * r[:, None] * (load_vector(weight, columns, hidden, compute_dtype) + weight_offset)
    if bias is not None:
        y += load_vector(bias, columns, hidden, compute_dtype)
    if seed is not None:
        y = tl.where(is_kept(seed, rows, columns, dropout), y * dropout_scale, 0.0)
    if output_scale is not None:
        y *= output_scale
    if residual_scale is not None:
        stream *= residual_scale
    if output_scales is not None:
        y *= load_scale(output_scales, columns, hidden, scales_per_channel, compute_dtype)
        stream *= load_scale(residual_scales, columns, hidden, scales_per_channel, compute_dtype)
    total = (stream + y).to(out.dtype.element_ty)  # out = a residual + b dropout(y), rounded once
    store_rows(out, rows, columns, hidden, mask, total)
    if normed is not None:
        z = total.to(compute_dtype)  # the rounded sum: what a norm by itself would read
        if next_mean is not None:
            m = tl.sum(z, 1) / hidden
            tl.store(next_mean + rows, m, mask=rows < n_rows)
            z = tl.where(mask, z - m[:, None], 0.0)
        r = tl.rsqrt(tl.sum(z * z, 1) / hidden + next_eps)
        tl.store(next_rstd + rows, r, mask=rows < n_rows)
        z = z * r[:, None] * (load_vector(next_weight, columns, hidden, compute_dtype) + weight_offset)
        if next_bias is not None:
            z += load_vector(next_bias, columns, hidden, compute_dtype)
        store_rows(normed, rows, columns, hidden, mask, z)


@triton.jit
def norm_add_backward(
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
    """Write ``grad_sublayer_output``, and from program ``i`` row ``i`` of the sums ``[programs, hidden]``.

    With ``grad_normed`` or ``a``, ``grad_residual`` is written too; without, it is ``grad_out``. The sums
    for learned scales, ``scale_partials``, are ``[2, programs]`` or ``[2, programs, hidden]``: ``a``'s first.
    """
    columns = tl.arange(0, block)
    factor = load_vector(weight, columns, hidden, compute_dtype) + weight_offset
    if output_scales is not None:  # so g has none of it below
        factor *= load_scale(output_scales, columns, hidden, scales_per_channel, compute_dtype)
        a = load_scale(residual_scales, columns, hidden, scales_per_channel, compute_dtype)
    # Parameter gradients stay in registers, one sum for each element of a tile, while the program walks over
    # its tiles. Those that aren't asked for are never added to, and the compiler drops them.
    weight_sum = tl.zeros((tile_rows, block), compute_dtype)
    bias_sum = tl.zeros((tile_rows, block), compute_dtype)
    sublayer_bias_sum = tl.zeros((tile_rows, block), compute_dtype)
    next_weight_sum = tl.zeros((tile_rows, block), compute_dtype)
    next_bias_sum = tl.zeros((tile_rows, block), compute_dtype)
    residual_scale_sum = tl.zeros((tile_rows, block), compute_dtype)
    # In strides of the grid: which rows a program adds, and in which order, depends on the size of the grid
    # alone. `num_stages` above 1 would have the next tile copied into shared memory meanwhile.
    step = tl.num_programs(0) * tile_rows
    for start in tl.range(tl.program_id(0) * tile_rows, n_rows, step, num_stages=stages):
        rows = start + tl.arange(0, tile_rows)
        mask = (rows < n_rows)[:, None] & (columns < hidden)[None, :]
        grad = load_rows(grad_out, rows, columns, grad_out_stride, mask, compute_dtype)
        # What is read comes first, so that it is in flight together: no load is moved across the exchange of
        # sums between warps, nor across stores. With LayerNorm registers don't suffice for that.
        if mean is None:
            x = load_rows(sublayer_output, rows, columns, sublayer_output_stride, mask, compute_dtype)
            if scale_partials is not None:
                stream = load_rows(residual, rows, columns, residual_stride, mask, compute_dtype)
        # Rows from `n_rows` on have rstd 0 and gradient 0, and add nothing to any sum.
        r = tl.load(rstd + rows, mask=rows < n_rows, other=0.0)[:, None]
        if grad_normed is not None:
            # Through the next norm: ẑ = (out - next_mean) next_rstd, k = grad_normed next_weight,
            # g = grad_out + next_rstd (k - ẑ mean(k ẑ) - mean(k)).
            above = load_rows(grad_normed, rows, columns, grad_normed_stride, mask, compute_dtype)
            z = load_rows(out, rows, columns, hidden, mask, compute_dtype)
            next_r = tl.load(next_rstd + rows, mask=rows < n_rows, other=0.0)[:, None]
            if mean is None:  # to spare registers, ptxas has loads wait for others that they can't pass now
                tl.debug_barrier()
            if next_mean is not None:
                z -= tl.load(next_mean + rows, mask=rows < n_rows, other=0.0)[:, None]
            z *= next_r
            weighted = above * (load_vector(next_weight, columns, hidden, compute_dtype) + weight_offset)
            grad_z = weighted - z * (tl.sum(weighted * z, 1) / hidden)[:, None]
            if next_mean is not None:
                grad_z -= (tl.sum(weighted, 1) / hidden)[:, None]
            # Masked columns aren't 0 by now, and would count in the means below.
            grad = tl.where(mask, grad + grad_z * next_r, 0.0)
            if residual_scale is None and residual_scales is None:
                store_rows(grad_residual, rows, columns, hidden, mask, grad)
            if next_weight_partials is not None:
                next_weight_sum += above * z  # d next_weight = Σ grad_normed ẑ
            if next_bias_partials is not None:
                next_bias_sum += above  # d next_bias = Σ grad_normed
        if residual_scale is not None:
            store_rows(grad_residual, rows, columns, hidden, mask, grad * residual_scale)
        if residual_scales is not None:
            store_rows(grad_residual, rows, columns, hidden, mask, grad * a)
        if mean is not None:
            x = load_rows(sublayer_output, rows, columns, sublayer_output_stride, mask, compute_dtype)
            if scale_partials is not None:
                stream = load_rows(residual, rows, columns, residual_stride, mask, compute_dtype)
        if scale_partials is not None:
            residual_scale_sum += grad * stream  # d a = Σ (gradient of out) residual
        if sublayer_bias is not None:
            x += load_vector(sublayer_bias, columns, hidden, compute_dtype)
        if mean is not None:
            x -= tl.load(mean + rows, mask=rows < n_rows, other=0.0)[:, None]
        if seed is not None:  # the forward pass's mask, drawn again
            grad = tl.where(is_kept(seed, rows, columns, dropout), grad * dropout_scale, 0.0)
        if output_scale is not None:
            grad *= output_scale
        normalized = x * r  # x̂ = (x - mean) rstd; not 0 in masked columns, but g is
        weighted = grad * factor  # h = g weight
        # d x = rstd (h - x̂ mean(h x̂) - mean(h))
        grad_x = weighted - normalized * (tl.sum(weighted * normalized, 1) / hidden)[:, None]
        if mean is not None:
            grad_x -= (tl.sum(weighted, 1) / hidden)[:, None]
        grad_x *= r
        store_rows(grad_sublayer_output, rows, columns, hidden, mask, grad_x)
        if weight_partials is not None or scale_partials is not None:
            weight_sum += grad * normalized  # d weight = Σ g x̂
        if bias_partials is not None or bias is not None:
            bias_sum += grad  # d bias = Σ g
        if sublayer_bias_partials is not None:
            sublayer_bias_sum += grad_x  # d sublayer_bias = Σ d x
    if scale_partials is not None:
        # d b = Σ (gradient of out, dropped) (x̂ weight + bias), of sums that have no b yet
        output_scale_sum = weight_sum * (load_vector(weight, columns, hidden, compute_dtype) + weight_offset)
        if bias is not None:
            output_scale_sum += bias_sum * load_vector(bias, columns, hidden, compute_dtype)
        if scales_per_channel:
            of_residual = scale_partials + tl.program_id(0).to(tl.int64) * hidden + columns
            of_output = of_residual + tl.num_programs(0).to(tl.int64) * hidden
            tl.store(of_residual, tl.sum(residual_scale_sum, 0), mask=columns < hidden)
            tl.store(of_output, tl.sum(output_scale_sum, 0), mask=columns < hidden)
        else:
            store_sums_of_all(scale_partials, residual_scale_sum, output_scale_sum)
    if output_scales is not None:
        b = load_scale(output_scales, columns, hidden, scales_per_channel, compute_dtype)
        weight_sum *= b
        bias_sum *= b
    row = tl.program_id(0).to(tl.int64) * hidden
    if weight_partials is not None:
        tl.store(weight_partials + row + columns, tl.sum(weight_sum, 0), mask=columns < hidden)
    if bias_partials is not None:
        tl.store(bias_partials + row + columns, tl.sum(bias_sum, 0), mask=columns < hidden)
    if sublayer_bias_partials is not None:
        tl.store(sublayer_bias_partials + row + columns, tl.sum(sublayer_bias_sum, 0), mask=columns < hidden)
    if next_weight_partials is not None:
        tl.store(next_weight_partials + row + columns, tl.sum(next_weight_sum, 0), mask=columns < hidden)
    if next_bias_partials is not None:
        tl.store(next_bias_partials + row + columns, tl.sum(next_bias_sum, 0), mask=columns < hidden)
