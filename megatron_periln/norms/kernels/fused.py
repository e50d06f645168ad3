"""The fused output norm: ``residual + dropout(norm(branch + bias))`` by one Triton kernel each way.

The kernel may also do the norm that follows: between them stands nothing but the residual add, so it has
the sum at hand; backward, the sum's two gradients are joined where they are needed.

The backward pass keeps ``branch``, the parameters, one or two fp32 numbers a row and the seed of
dropout, no normed or dropped copy. Parameter gradients are summed in a fixed order, without
atomics, so that the same step gives the same bits.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_periln.norms.kernels import triton_kernels
from megatron_periln.norms.kernels.backends import MAX_JOINED_HIDDEN_SIZE
from megatron_periln.norms.kernels.launches import (
    MAX_HIDDEN_SIZE,
    Launch,
    as_rows,
    backward_kernel,
    constants,
    device_of,
    forward_kernel,
    is_whole,
    joined_launch,
    launch,
    sum_partials,
    tiles,
)

__all__ = ["INTERPRETED", "norm_add", "norm_add_norm"]

# Whether TRITON_INTERPRET=1 was set when the kernels were imported: they run on the CPU, slowly.
INTERPRETED = not isinstance(triton_kernels.norm_add_forward, triton.JITFunction)

# The partial sums of the parameters' gradients, by where their parameter stands among the arguments.
_PARTIALS = {
    "gain_partials": 3,
    "shift_partials": 4,
    "bias_partials": 1,
    "next_gain_partials": 5,
    "next_shift_partials": 6,
}


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
    settings = (eps, 0.0, float(zero_centered_gamma), dropout if training else 0.0, None)
    return _NormAdd.apply(branch, bias, residual, gain, shift, None, None, *settings)[0]


def norm_add_norm(
    branch: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    gain: Tensor,
    shift: Tensor | None,
    eps: float,
    zero_centered_gamma: bool,
    dropout: float,
    training: bool,
    next_gain: Tensor,
    next_shift: Tensor | None,
    next_eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`megatron_periln.norms.kernels.reference.norm_add_norm`, fused; dropout as in `norm_add`.

    Raises
    ------
    ValueError
        If a row is longer than `MAX_JOINED_HIDDEN_SIZE`.
    """
    hidden_size = branch.shape[-1]
    if hidden_size > MAX_JOINED_HIDDEN_SIZE:
        raise ValueError(
            f"the joined Triton kernels take a hidden size of {MAX_JOINED_HIDDEN_SIZE} at most, "
            f"not {hidden_size}"
        )
    settings = (eps, next_eps, float(zero_centered_gamma), dropout if training else 0.0, dtype)
    return _NormAdd.apply(branch, bias, residual, gain, shift, next_gain, next_shift, *settings)


class _NormAdd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        branch: Tensor,
        bias: Tensor | None,
        residual: Tensor,
        gain: Tensor,
        shift: Tensor | None,
        next_gain: Tensor | None,
        next_shift: Tensor | None,
        eps: float,
        next_eps: float,
        gain_offset: float,
        dropout: float,
        dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor | None]:
        rows, stream = as_rows(branch), as_rows(residual)
        count, hidden = rows.shape
        wide = torch.promote_types(torch.promote_types(branch.dtype, residual.dtype), torch.float32)
        out = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
        rstd = torch.empty(count, dtype=wide, device=branch.device)
        mean = None if shift is None else torch.empty_like(rstd)
        seed = None
        if dropout > 0:
            seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=branch.device)
        following: dict[str, Any] = {}
        if next_gain is not None:
            following = {
                "next_gain": next_gain,
                "next_shift": next_shift,
                "next_eps": next_eps,
                "normed": torch.empty(residual.shape, dtype=dtype, device=residual.device),
                "next_mean": None if next_shift is None else torch.empty_like(rstd),
                "next_rstd": torch.empty_like(rstd),
            }
        normed = following.get("normed")
        for_next = (following.get("next_mean"), following.get("next_rstd"))
        kept = (None if normed is None else out, next_gain, *for_next)
        ctx.save_for_backward(branch, bias, gain, seed, mean, rstd, *kept)
        ctx.gain_offset, ctx.dropout = gain_offset, dropout
        if not count:
            return out, normed
        shape = _shape(hidden, bias, mean, seed, next_gain)
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
                _scale(dropout),
                **following,
                **constants(shape, hidden, gain_offset, wide),
            )
        return out, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_normed: Tensor | None) -> tuple[Tensor | None, ...]:
        branch, bias, gain, seed, mean, rstd, out, next_gain, next_mean, next_rstd = ctx.saved_tensors
        wanted = [name for name, position in _PARTIALS.items() if ctx.needs_input_grad[position]]
        if next_gain is None and not (ctx.needs_input_grad[0] or wanted):
            return None, None, grad_out, *(9 * [None])
        rows, grads = as_rows(branch), as_rows(grad_out)
        count, hidden = rows.shape
        shape = _shape(hidden, bias, mean, seed, next_gain)
        most_programs = shape.programs_per_sm * _multiprocessors(branch.device)
        programs = max(1, min(tiles(count, shape.tile_rows), most_programs))
        grad_branch = torch.empty(branch.shape, dtype=branch.dtype, device=branch.device)
        create = torch.empty if is_whole(shape, hidden) else torch.zeros
        partials = create(len(wanted), programs, hidden, dtype=rstd.dtype, device=branch.device)
        partial = dict(zip(wanted, partials.unbind(), strict=True))
        grad_residual, following = grad_out, {}
        if next_gain is not None:
            assert grad_normed is not None
            above = as_rows(grad_normed)
            grad_residual = torch.empty(out.shape, dtype=out.dtype, device=out.device)
            following = {
                "grad_normed": above,
                "out": out,
                "next_gain": next_gain,
                "next_mean": next_mean,
                "next_rstd": next_rstd,
                "grad_residual": grad_residual,
                "next_gain_partials": partial.get("next_gain_partials"),
                "next_shift_partials": partial.get("next_shift_partials"),
                "normed_stride": above.stride(0),
            }
        with device_of(branch):
            backward_kernel(shape, hidden)[(programs,)](
                grads,
                rows,
                bias,
                gain,
                seed,
                mean,
                rstd,
                grad_branch,
                partial.get("gain_partials"),
                partial.get("shift_partials"),
                partial.get("bias_partials"),
                count,
                grads.stride(0),
                rows.stride(0),
                ctx.dropout,
                _scale(ctx.dropout),
                stages=shape.stages,
                **following,
                **constants(shape, hidden, ctx.gain_offset, rstd.dtype),
            )
            parameters = {1: bias, 3: gain, 4: gain, 5: next_gain, 6: next_gain}
            dtypes = {tensor.dtype for tensor in parameters.values() if tensor is not None}
            sums = sum_partials(partials, gain.dtype if len(dtypes) == 1 else rstd.dtype)
        of = {_PARTIALS[name]: total for name, total in zip(wanted, sums, strict=True)}
        of = {position: total.to(parameters[position].dtype) for position, total in of.items()}
        return grad_branch, of.get(1), grad_residual, *(of.get(i) for i in (3, 4, 5, 6)), *(5 * [None])


def _shape(hidden: int, bias: Any, mean: Any, seed: Any, next_gain: Any) -> Launch:
    if next_gain is not None:
        return joined_launch(hidden)
    return launch(hidden, bias is None and mean is None and seed is None)


def _scale(dropout: float) -> float:
    return 1 / (1 - dropout) if dropout < 1 else 0.0


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
