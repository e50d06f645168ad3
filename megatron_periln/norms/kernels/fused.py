"""The output norm as one Triton kernel forward and one backward, with the bias, dropout and residual add.

And with the next norm, if asked for.

With ``x = sublayer_output + sublayer_bias`` and, for each row,

    mean = Σ x / hidden                              0 for RMSNorm
    rstd = 1 / sqrt(Σ (x - mean)² / hidden + eps)
    x̂ = (x - mean) rstd

the forward pass is ``out = residual + dropout(x̂ weight + bias)``. With ``g`` the gradient of ``out``, dropped
likewise, and ``h = g weight``, the backward pass is

    d sublayer_output = rstd (h - x̂ mean(h x̂) - mean(h))      the last term for LayerNorm only
    d weight = Σ g x̂,   d bias = Σ g,   d sublayer_bias = Σ d sublayer_output      over all rows
    d residual = the gradient of out

The next norm, which only the residual add divides from this one, reads ``out`` while it is at hand. Backward,
what passes through it is the same formula, and adds to the gradient of ``out``.

Kept for the backward pass: the sublayer output, the parameters, one or two numbers a row and the seed of
dropout; no normed or dropped copy (`_Saved`). Parameter gradients are summed in a fixed order, without
atomics, so that the same step gives the same bits.

The kernels here hold whole rows in registers; `fused_long_rows` has those for rows that don't fit. In both
an argument that is None (``sublayer_bias``, ``bias``, ``seed`` without dropout, ``mean`` for RMSNorm, what
belongs to the next norm, the sums of parameters that need no gradient) is a constant to the compiler, which
leaves out what is done with it: one source makes a kernel for each combination, and none asks at run time.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_periln.norms.kernels.fused_long_rows import long_norm_add_backward, long_norm_add_forward
from megatron_periln.norms.kernels.launch_config import (
    MAX_NORM_ADD_HIDDEN_SIZE,
    MAX_NORM_ADD_NORM_HIDDEN_SIZE,
    LaunchConfig,
    choose_launch_config,
)
from megatron_periln.norms.kernels.triton_rows import (
    is_kept,
    load_rows,
    load_vector,
    reduce_partials,
    store_rows,
)

__all__ = ["INTERPRETED", "kernels_for", "multiprocessors", "norm_add", "norm_add_norm"]


# --- The kernels.


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
    n_rows: tl.tensor,
    sublayer_output_stride: tl.tensor,
    residual_stride: tl.tensor,
    eps: tl.tensor,
    dropout: tl.tensor,
    dropout_scale: tl.tensor,
    weight_offset: tl.constexpr,
    hidden: tl.constexpr,
    block: tl.constexpr,
    tile_rows: tl.constexpr,
    compute_dtype: tl.constexpr,
    next_weight: tl.tensor = None,
    next_bias: tl.tensor = None,
    next_eps: tl.tensor = None,
    normed: tl.tensor = None,
    next_mean: tl.tensor = None,
    next_rstd: tl.tensor = None,
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
    total = (stream + y).to(out.dtype.element_ty)  # out = residual + dropout(y), rounded once
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
    weight_partials: tl.tensor,
    bias_partials: tl.tensor,
    sublayer_bias_partials: tl.tensor,
    n_rows: tl.tensor,
    grad_out_stride: tl.tensor,
    sublayer_output_stride: tl.tensor,
    dropout: tl.tensor,
    dropout_scale: tl.tensor,
    weight_offset: tl.constexpr,
    hidden: tl.constexpr,
    block: tl.constexpr,
    tile_rows: tl.constexpr,
    compute_dtype: tl.constexpr,
    stages: tl.constexpr,
    grad_normed: tl.tensor = None,
    out: tl.tensor = None,
    next_weight: tl.tensor = None,
    next_mean: tl.tensor = None,
    next_rstd: tl.tensor = None,
    grad_residual: tl.tensor = None,
    next_weight_partials: tl.tensor = None,
    next_bias_partials: tl.tensor = None,
    grad_normed_stride: tl.tensor = None,
) -> None:
    """Write ``grad_sublayer_output``, and from program ``i`` row ``i`` of the sums ``[programs, hidden]``.

    With ``grad_normed``, ``grad_residual`` is written too; without, it is ``grad_out``.
    """
    columns = tl.arange(0, block)
    factor = load_vector(weight, columns, hidden, compute_dtype) + weight_offset
    # Parameter gradients stay in registers, one sum for each element of a tile, while the program walks over
    # its tiles. Those that aren't asked for are never added to, and the compiler drops them.
    weight_sum = tl.zeros((tile_rows, block), compute_dtype)
    bias_sum = tl.zeros((tile_rows, block), compute_dtype)
    sublayer_bias_sum = tl.zeros((tile_rows, block), compute_dtype)
    next_weight_sum = tl.zeros((tile_rows, block), compute_dtype)
    next_bias_sum = tl.zeros((tile_rows, block), compute_dtype)
    # In strides of the grid: which rows a program adds, and in which order, depends on the size of the grid
    # alone. `num_stages` above 1 would have the next tile copied into shared memory meanwhile.
    step = tl.num_programs(0) * tile_rows
    for start in tl.range(tl.program_id(0) * tile_rows, n_rows, step, num_stages=stages):
        rows = start + tl.arange(0, tile_rows)
        mask = (rows < n_rows)[:, None] & (columns < hidden)[None, :]
        grad = load_rows(grad_out, rows, columns, grad_out_stride, mask, compute_dtype)
        if grad_normed is not None:
            # Through the next norm: ẑ = (out - next_mean) next_rstd, k = grad_normed next_weight,
            # g = grad_out + next_rstd (k - ẑ mean(k ẑ) - mean(k)).
            above = load_rows(grad_normed, rows, columns, grad_normed_stride, mask, compute_dtype)
            z = load_rows(out, rows, columns, hidden, mask, compute_dtype)
            if next_mean is not None:
                z -= tl.load(next_mean + rows, mask=rows < n_rows, other=0.0)[:, None]
            next_r = tl.load(next_rstd + rows, mask=rows < n_rows, other=0.0)[:, None]
            z *= next_r
            weighted = above * (load_vector(next_weight, columns, hidden, compute_dtype) + weight_offset)
            grad_z = weighted - z * (tl.sum(weighted * z, 1) / hidden)[:, None]
            if next_mean is not None:
                grad_z -= (tl.sum(weighted, 1) / hidden)[:, None]
            # Masked columns aren't 0 by now, and would count in the means below.
            grad = tl.where(mask, grad + grad_z * next_r, 0.0)
            store_rows(grad_residual, rows, columns, hidden, mask, grad)
            if next_weight_partials is not None:
                next_weight_sum += above * z  # d next_weight = Σ grad_normed ẑ
            if next_bias_partials is not None:
                next_bias_sum += above  # d next_bias = Σ grad_normed
        x = load_rows(sublayer_output, rows, columns, sublayer_output_stride, mask, compute_dtype)
        # Rows from `n_rows` on have rstd 0 and gradient 0, and add nothing to any sum.
        r = tl.load(rstd + rows, mask=rows < n_rows, other=0.0)[:, None]
        if sublayer_bias is not None:
            x += load_vector(sublayer_bias, columns, hidden, compute_dtype)
        if mean is not None:
            x -= tl.load(mean + rows, mask=rows < n_rows, other=0.0)[:, None]
        if seed is not None:  # the forward pass's mask, drawn again
            grad = tl.where(is_kept(seed, rows, columns, dropout), grad * dropout_scale, 0.0)
        normalized = x * r  # x̂ = (x - mean) rstd; not 0 in masked columns, but g is
        weighted = grad * factor  # h = g weight
        # d x = rstd (h - x̂ mean(h x̂) - mean(h))
        grad_x = weighted - normalized * (tl.sum(weighted * normalized, 1) / hidden)[:, None]
        if mean is not None:
            grad_x -= (tl.sum(weighted, 1) / hidden)[:, None]
        grad_x *= r
        store_rows(grad_sublayer_output, rows, columns, hidden, mask, grad_x)
        if weight_partials is not None:
            weight_sum += grad * normalized  # d weight = Σ g x̂
        if bias_partials is not None:
            bias_sum += grad  # d bias = Σ g
        if sublayer_bias_partials is not None:
            sublayer_bias_sum += grad_x  # d sublayer_bias = Σ d x
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


# Whether TRITON_INTERPRET=1 was set when the kernels were imported: they run on the CPU, slowly.
INTERPRETED = not isinstance(norm_add_forward, triton.JITFunction)


# --- How they are launched.

_TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}


def kernels_for(config: LaunchConfig, hidden_size: int) -> tuple[Any, Any]:
    """Return the forward and the backward kernel for tiles of ``config``."""
    if config.block >= hidden_size:
        return norm_add_forward, norm_add_backward
    return long_norm_add_forward, long_norm_add_backward


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a GPU has; 2 for the interpreter, so that sums have parts there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _as_rows(tensor: Tensor) -> Tensor:
    """View ``[..., hidden]`` as ``[rows, hidden]`` whose rows are contiguous, copying only where it must."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make a tensor's GPU the one that kernels are launched on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


# --- The autograd function.

_INPUTS = ("sublayer_output", "sublayer_bias", "residual", "weight", "bias", "next_weight", "next_bias")
_PARAMETERS = ("sublayer_bias", "weight", "bias", "next_weight", "next_bias")


class _Options(NamedTuple):
    """What a call is given beside tensors."""

    eps: float
    weight_offset: float
    dropout: float
    next_eps: float = 0.0
    next_dtype: torch.dtype | None = None


class _Saved(NamedTuple):
    """What the backward pass gets of the forward pass; the last four with the next norm only."""

    sublayer_output: Tensor
    sublayer_bias: Tensor | None
    weight: Tensor
    seed: Tensor | None
    mean: Tensor | None
    rstd: Tensor
    out: Tensor | None
    next_weight: Tensor | None
    next_mean: Tensor | None
    next_rstd: Tensor | None

    def launch_config(self) -> LaunchConfig:
        """Return the launch config, that of both passes."""
        plain = self.sublayer_bias is None and self.mean is None and self.seed is None
        return choose_launch_config(self.sublayer_output.shape[-1], plain, self.next_weight is not None)

    def arguments(self, options: _Options, config: LaunchConfig) -> dict[str, Any]:
        """Return the arguments that the forward and the backward kernel share."""
        x = _as_rows(self.sublayer_output)
        arguments = {
            "sublayer_output": x,
            "sublayer_bias": self.sublayer_bias,
            "weight": self.weight,
            "seed": self.seed,
            "mean": self.mean,
            "rstd": self.rstd,
            "n_rows": x.shape[0],
            "sublayer_output_stride": x.stride(0),
            "dropout": options.dropout,
            "dropout_scale": 1 / (1 - options.dropout) if options.dropout < 1 else 0.0,
            "weight_offset": options.weight_offset,
            "hidden": x.shape[1],
            "block": config.block,
            "tile_rows": config.tile_rows,
            "compute_dtype": _TRITON_DTYPE[self.rstd.dtype],
            "num_warps": config.num_warps,
            "enable_fp_fusion": True,  # whatever TRITON_DEFAULT_FP_FUSION says: it changes bits
        }
        if self.next_weight is not None:  # which the kernels for long rows don't know
            arguments |= {
                "next_weight": self.next_weight,
                "next_mean": self.next_mean,
                "next_rstd": self.next_rstd,
            }
        return arguments


class _NormAdd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        sublayer_output: Tensor,
        sublayer_bias: Tensor | None,
        residual: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        next_weight: Tensor | None,
        next_bias: Tensor | None,
        options: _Options,
    ) -> tuple[Tensor, Tensor | None]:
        stream = _as_rows(residual)
        n_rows, hidden = stream.shape
        device = residual.device
        compute_dtype = torch.promote_types(
            torch.promote_types(sublayer_output.dtype, residual.dtype), torch.float32
        )
        out = torch.empty(residual.shape, dtype=residual.dtype, device=device)
        rstd = torch.empty(n_rows, dtype=compute_dtype, device=device)
        mean = None if bias is None else torch.empty_like(rstd)
        seed = None
        if options.dropout > 0:
            seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)
        normed = next_mean = next_rstd = None
        if next_weight is not None:
            normed = torch.empty(residual.shape, dtype=options.next_dtype, device=device)
            next_mean = None if next_bias is None else torch.empty_like(rstd)
            next_rstd = torch.empty_like(rstd)
        kept_out = None if normed is None else out
        saved = _Saved(
            sublayer_output,
            sublayer_bias,
            weight,
            seed,
            mean,
            rstd,
            kept_out,
            next_weight,
            next_mean,
            next_rstd,
        )
        ctx.save_for_backward(*saved)
        ctx.options = options
        if not n_rows:
            return out, normed
        config = saved.launch_config()
        arguments = saved.arguments(options, config) | {
            "residual": stream,
            "residual_stride": stream.stride(0),
            "bias": bias,
            "eps": options.eps,
            "out": out,
        }
        if normed is not None:
            arguments |= {"next_bias": next_bias, "next_eps": options.next_eps, "normed": normed}
        kernel, _ = kernels_for(config, hidden)
        with _device_of(residual):
            kernel[(triton.cdiv(n_rows, config.tile_rows),)](**arguments)
        return out, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_normed: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, needed = _Saved(*ctx.saved_tensors), dict(zip(_INPUTS, ctx.needs_input_grad, strict=False))
        parameters = [name for name in _PARAMETERS if needed[name]]
        if saved.next_weight is not None:
            assert grad_normed is not None
            gradients = _gradients(saved, ctx.options, parameters, grad_out, grad_normed)
        elif needed["sublayer_output"] or parameters:
            gradients = _gradients(saved, ctx.options, parameters, grad_out)
        else:
            gradients = {"residual": grad_out}
        return *map(gradients.get, _INPUTS), None  # the options have none


def _gradients(
    saved: _Saved,
    options: _Options,
    parameters: list[str],
    grad_out: Tensor,
    grad_normed: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return the gradients of the sublayer output, of the residual and of ``parameters``, by name."""
    x, rstd = saved.sublayer_output, saved.rstd
    n_rows, hidden = len(rstd), x.shape[-1]
    config = saved.launch_config()
    _, kernel = kernels_for(config, hidden)
    most_programs = config.programs_per_sm * multiprocessors(x.device)
    # One at least: without rows it writes sums of zero.
    programs = max(1, min(triton.cdiv(n_rows, config.tile_rows), most_programs))
    # The kernel for long rows adds to its partial sums, those of whole rows write them once.
    create = torch.zeros if kernel is long_norm_add_backward else torch.empty
    partials = create(len(parameters), programs, hidden, dtype=rstd.dtype, device=x.device)
    partials_of = dict(zip(parameters, partials.unbind(), strict=True))
    grad_rows = _as_rows(grad_out)
    grad_sublayer_output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_residual = grad_out
    arguments = saved.arguments(options, config) | {
        "grad_out": grad_rows,
        "grad_out_stride": grad_rows.stride(0),
        "grad_sublayer_output": grad_sublayer_output,
        "weight_partials": partials_of.get("weight"),
        "bias_partials": partials_of.get("bias"),
        "sublayer_bias_partials": partials_of.get("sublayer_bias"),
        "stages": config.stages,
    }
    if grad_normed is not None:
        assert saved.out is not None
        grad_normed_rows = _as_rows(grad_normed)
        grad_residual = torch.empty(saved.out.shape, dtype=saved.out.dtype, device=x.device)
        arguments |= {
            "out": saved.out,
            "grad_normed": grad_normed_rows,
            "grad_normed_stride": grad_normed_rows.stride(0),
            "grad_residual": grad_residual,
            "next_weight_partials": partials_of.get("next_weight"),
            "next_bias_partials": partials_of.get("next_bias"),
        }
    # A bias has the dtype of its norm's weight. Where all dtypes are one, the sums are written in it at once.
    dtypes = {"weight": saved.weight.dtype, "bias": saved.weight.dtype}
    if saved.sublayer_bias is not None:
        dtypes["sublayer_bias"] = saved.sublayer_bias.dtype
    if saved.next_weight is not None:
        dtypes |= {"next_weight": saved.next_weight.dtype, "next_bias": saved.next_weight.dtype}
    one_dtype = len(set(dtypes.values())) == 1
    with _device_of(x):
        kernel[(programs,)](**arguments)
        sums = reduce_partials(partials, saved.weight.dtype if one_dtype else rstd.dtype)
    gradients = {"sublayer_output": grad_sublayer_output, "residual": grad_residual}
    for name, total in zip(parameters, sums, strict=True):
        gradients[name] = total.to(dtypes[name])
    return gradients


# --- The functions.


def norm_add(
    sublayer_output: Tensor,
    sublayer_bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    zero_centered_gamma: bool,
    dropout: float,
    training: bool,
) -> Tensor:
    """`megatron_periln.norms.kernels.reference.norm_add`, fused.

    Dropout draws one number from the device's generator, which seeds all of a call's elements:
    where Megatron restores the generator, as in recomputation, the same elements are dropped, and
    ranks that share the generator's state drop the same ones.

    Raises
    ------
    ValueError
        If a row is longer than `MAX_NORM_ADD_HIDDEN_SIZE`.
    """
    hidden_size = sublayer_output.shape[-1]
    if hidden_size > MAX_NORM_ADD_HIDDEN_SIZE:
        raise ValueError(
            f"the Triton kernels take a hidden size of {MAX_NORM_ADD_HIDDEN_SIZE} at most, not {hidden_size}"
        )
    options = _Options(eps, float(zero_centered_gamma), dropout if training else 0.0)
    inputs = (sublayer_output, sublayer_bias, residual, weight, bias, None, None)
    return _NormAdd.apply(*inputs, options)[0]


def norm_add_norm(
    sublayer_output: Tensor,
    sublayer_bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    zero_centered_gamma: bool,
    dropout: float,
    training: bool,
    next_weight: Tensor,
    next_bias: Tensor | None,
    next_eps: float,
    next_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`megatron_periln.norms.kernels.reference.norm_add_norm`, fused; dropout as in `norm_add`.

    Raises
    ------
    ValueError
        If a row is longer than `MAX_NORM_ADD_NORM_HIDDEN_SIZE`.
    """
    hidden_size = sublayer_output.shape[-1]
    if hidden_size > MAX_NORM_ADD_NORM_HIDDEN_SIZE:
        raise ValueError(
            "the Triton kernels with the next norm take a hidden size of "
            f"{MAX_NORM_ADD_NORM_HIDDEN_SIZE} at most, not {hidden_size}"
        )
    dropout = dropout if training else 0.0
    options = _Options(eps, float(zero_centered_gamma), dropout, next_eps, next_dtype)
    inputs = (sublayer_output, sublayer_bias, residual, weight, bias, next_weight, next_bias)
    return _NormAdd.apply(*inputs, options)
