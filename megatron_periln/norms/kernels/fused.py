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
    Launch,
    backward_kernel,
    forward_kernel,
    is_whole,
    launch,
)

__all__ = [
    "INTERPRETED",
    "as_rows",
    "constants",
    "device_of",
    "new_seed",
    "norm_add",
    "programs",
    "scale",
    "sum_partials",
    "tiles",
]

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
        rows, stream = as_rows(branch), as_rows(residual)
        count, hidden = rows.shape
        wide = torch.promote_types(torch.promote_types(branch.dtype, residual.dtype), torch.float32)
        out = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
        rstd = torch.empty(count, dtype=wide, device=branch.device)
        mean = None if shift is None else torch.empty_like(rstd)
        seed = new_seed(branch.device) if dropout > 0 else None
        ctx.save_for_backward(branch, bias, gain, seed, mean, rstd)
        ctx.gain_offset, ctx.dropout = gain_offset, dropout
        if not count:
            return out
        shape = launch(hidden, bias is None and shift is None and seed is None)
        with device_of(branch):
            forward_kernel(shape, hidden)[(tiles(count, shape.tile_rows),)](
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
                scale(dropout),
                **constants(shape, hidden, gain_offset, wide),
            )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        branch, bias, gain, seed, mean, rstd = ctx.saved_tensors
        for_branch, for_bias, _, for_gain, for_shift, *_ = ctx.needs_input_grad
        if not (for_branch or for_bias or for_gain or for_shift):
            return None, None, grad_out, None, None, None, None, None
        rows, grads = as_rows(branch), as_rows(grad_out)
        count, hidden = rows.shape
        shape = launch(hidden, bias is None and mean is None and seed is None)
        grid = programs(shape, count, branch.device)
        grad_branch = torch.empty(branch.shape, dtype=branch.dtype, device=branch.device)
        wanted = [name for name, wants in zip("gsb", (for_gain, for_shift, for_bias), strict=True) if wants]
        create = torch.empty if is_whole(shape, hidden) else torch.zeros
        partials = create(len(wanted), grid, hidden, dtype=rstd.dtype, device=branch.device)
        partial = dict(zip(wanted, partials.unbind(), strict=True))
        with device_of(branch):
            backward_kernel(shape, hidden)[(grid,)](
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
                scale(ctx.dropout),
                stages=shape.stages,
                **constants(shape, hidden, ctx.gain_offset, rstd.dtype),
            )
            same_dtype = bias is None or bias.dtype == gain.dtype
            sums = dict(
                zip(wanted, sum_partials(partials, gain.dtype if same_dtype else rstd.dtype), strict=True)
            )
        grad_gain, grad_shift = (sums[name].to(gain.dtype) if name in sums else None for name in "gs")
        grad_bias = sums["b"].to(bias.dtype) if for_bias else None
        return grad_branch, grad_bias, grad_out, grad_gain, grad_shift, None, None, None


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


def as_rows(tensor: Tensor) -> Tensor:
    """View ``[..., hidden]`` as ``[rows, hidden]`` whose rows are contiguous, copying only where it must."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def new_seed(device: torch.device) -> Tensor:
    """Draw the seed of a call's dropout, ``[1]``, from the device's generator."""
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)


def scale(dropout: float) -> float:
    """Return what dropout multiplies the elements with that it keeps."""
    return 1 / (1 - dropout) if dropout < 1 else 0.0


def tiles(length: int, tile: int) -> int:
    """Return how many tiles cover a length."""
    return -(-length // tile)


def programs(shape: Launch, rows: int, device: torch.device) -> int:
    """Return the size of the backward grid."""
    return max(1, min(tiles(rows, shape.tile_rows), shape.programs_per_sm * _multiprocessors(device)))


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


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
