"""The fused output norm: ``residual + dropout(norm(branch + bias))`` by one Triton kernel each way.

The backward pass keeps ``branch``, the parameters, one or two fp32 numbers a row and the seed of
dropout, no normed or dropped copy. Parameter gradients are summed in a fixed order, without
atomics, so that the same step gives the same bits.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_periln.norms.kernels import triton_kernels
from megatron_periln.norms.kernels.launches import (
    MAX_HIDDEN_SIZE,
    backward_kernel,
    forward_kernel,
    is_whole,
    launch,
)

__all__ = ["INTERPRETED", "norm_add"]

# Whether TRITON_INTERPRET=1 was set when the kernels were imported: they run on the CPU, slowly.
INTERPRETED = not isinstance(triton_kernels.norm_add_forward, triton.JITFunction)

_SUM_TILE = (64, 16)
_TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}


def norm_add(
    branch: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    gain: Tensor,
    shift: Tensor | None,
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
        If a row is longer than `MAX_HIDDEN_SIZE`.
    """
    hidden_size = branch.shape[-1]
    if hidden_size > MAX_HIDDEN_SIZE:
        raise ValueError(
            f"the Triton kernels take a hidden size of {MAX_HIDDEN_SIZE} at most, not {hidden_size}"
        )
    rate = dropout if training else 0.0
    return _NormAdd.apply(branch, bias, residual, gain, shift, eps, float(zero_centered_gamma), rate)


class _NormAdd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        branch: Tensor,
        bias: Tensor | None,
        residual: Tensor,
        gain: Tensor,
        shift: Tensor | None,
        eps: float,
        gain_offset: float,
        dropout: float,
    ) -> Tensor:
        rows, stream = _as_rows(branch), _as_rows(residual)
        count, hidden = rows.shape
        wide = torch.promote_types(torch.promote_types(branch.dtype, residual.dtype), torch.float32)
        out = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
        rstd = torch.empty(count, dtype=wide, device=branch.device)
        mean = None if shift is None else torch.empty_like(rstd)
        seed = None
        if dropout > 0:
            seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=branch.device)
        ctx.save_for_backward(branch, bias, gain, seed, mean, rstd)
        ctx.gain_offset, ctx.dropout = gain_offset, dropout
        if not count:
            return out
        shape = launch(hidden, bias is None and shift is None and seed is None)
        with _device_of(branch):
            forward_kernel(shape, hidden)[(_tiles(count, shape.tile_rows),)](
                rows,
                bias,
                stream,
                gain,
                shift,
                seed,
                out,
                mean,
                rstd,
                count,
                rows.stride(0),
                stream.stride(0),
                eps,
                dropout,
                _scale(dropout),
                gain_offset=gain_offset,
                hidden=hidden,
                block=shape.block,
                tile_rows=shape.tile_rows,
                wide=_TRITON_DTYPE[wide],
                num_warps=shape.num_warps,
                enable_fp_fusion=True,
            )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        branch, bias, gain, seed, mean, rstd = ctx.saved_tensors
        for_branch, for_bias, _, for_gain, for_shift, *_ = ctx.needs_input_grad
        if not (for_branch or for_bias or for_gain or for_shift):
            return None, None, grad_out, None, None, None, None, None
        rows, grads = _as_rows(branch), _as_rows(grad_out)
        count, hidden = rows.shape
        shape = launch(hidden, bias is None and mean is None and seed is None)
        most_programs = shape.programs_per_sm * _multiprocessors(branch.device)
        programs = max(1, min(_tiles(count, shape.tile_rows), most_programs))
        grad_branch = torch.empty(branch.shape, dtype=branch.dtype, device=branch.device)
        wanted = [name for name, wants in zip("gsb", (for_gain, for_shift, for_bias), strict=True) if wants]
        create = torch.empty if is_whole(shape, hidden) else torch.zeros
        partials = create(len(wanted), programs, hidden, dtype=rstd.dtype, device=branch.device)
        partial = dict(zip(wanted, partials.unbind(), strict=True))
        with _device_of(branch):
            backward_kernel(shape, hidden)[(programs,)](
                grads,
                rows,
                bias,
                gain,
                seed,
                mean,
                rstd,
                grad_branch,
                partial.get("g"),
                partial.get("s"),
                partial.get("b"),
                count,
                grads.stride(0),
                rows.stride(0),
                ctx.dropout,
                _scale(ctx.dropout),
                gain_offset=ctx.gain_offset,
                hidden=hidden,
                block=shape.block,
                tile_rows=shape.tile_rows,
                wide=_TRITON_DTYPE[rstd.dtype],
                stages=shape.stages,
                num_warps=shape.num_warps,
                enable_fp_fusion=True,
            )
            same_dtype = bias is None or bias.dtype == gain.dtype
            sums = dict(zip(wanted, _sum(partials, gain.dtype if same_dtype else rstd.dtype), strict=True))
        grad_gain, grad_shift = (sums[name].to(gain.dtype) if name in sums else None for name in "gs")
        grad_bias = sums["b"].to(bias.dtype) if for_bias else None
        return grad_branch, grad_bias, grad_out, grad_gain, grad_shift, None, None, None


def _sum(partials: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Sum ``[kinds, programs, hidden]`` over programs, in a fixed order."""
    kinds, programs, hidden = partials.shape
    sums = torch.empty(kinds, hidden, dtype=dtype, device=partials.device)
    if kinds:
        tile_rows, tile_columns = _SUM_TILE
        triton_kernels.sum_partials[(_tiles(hidden, tile_columns), kinds)](
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


def _as_rows(tensor: Tensor) -> Tensor:
    """View ``[..., hidden]`` as ``[rows, hidden]`` whose rows are contiguous, copying only where it must."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _tiles(length: int, tile: int) -> int:
    return -(-length // tile)


def _scale(dropout: float) -> float:
    return 1 / (1 - dropout) if dropout < 1 else 0.0


def _device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
