"""The fused output norm and the norm that follows it, by one Triton kernel each way.

Between them stands nothing but the residual add: the kernel has the sum at hand, so the next norm need
not read it again; backward, the sum's two gradients are joined where they are needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_periln.norms.kernels import fused, triton_kernels
from megatron_periln.norms.kernels.backends import MAX_JOINED_HIDDEN_SIZE
from megatron_periln.norms.kernels.launches import joined_launch

__all__ = ["norm_add_norm"]

# Partial sums of the parameters' gradients, by where their parameter stands among the arguments.
_PARTIALS = {
    "gain_partials": 3,
    "shift_partials": 4,
    "bias_partials": 1,
    "next_gain_partials": 5,
    "next_shift_partials": 6,
}


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
    """`megatron_periln.norms.kernels.reference.norm_add_norm`, fused; dropout as in `fused.norm_add`.

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
    return _NormAddNorm.apply(branch, bias, residual, gain, shift, next_gain, next_shift, *settings)


class _NormAddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        branch: Tensor,
        bias: Tensor | None,
        residual: Tensor,
        gain: Tensor,
        shift: Tensor | None,
        next_gain: Tensor,
        next_shift: Tensor | None,
        eps: float,
        next_eps: float,
        gain_offset: float,
        dropout: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        rows, stream = fused.as_rows(branch), fused.as_rows(residual)
        count, hidden = rows.shape
        wide = torch.promote_types(torch.promote_types(branch.dtype, residual.dtype), torch.float32)
        out = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
        normed = torch.empty(residual.shape, dtype=dtype, device=residual.device)
        rstd, next_rstd = torch.empty(2, count, dtype=wide, device=branch.device)
        mean = None if shift is None else torch.empty_like(rstd)
        next_mean = None if next_shift is None else torch.empty_like(rstd)
        seed = fused.new_seed(branch.device) if dropout > 0 else None
        ctx.save_for_backward(branch, bias, gain, seed, mean, rstd, out, next_gain, next_mean, next_rstd)
        ctx.gain_offset, ctx.dropout = gain_offset, dropout
        if not count:
            return out, normed
        shape = joined_launch(hidden)
        with fused.device_of(branch):
            triton_kernels.norm_add_forward[(fused.tiles(count, shape.tile_rows),)](
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
                fused.scale(dropout),
                next_gain=next_gain,
                next_shift=next_shift,
                next_eps=next_eps,
                normed=normed,
                next_mean=next_mean,
                next_rstd=next_rstd,
                **fused.constants(shape, hidden, gain_offset, wide),
            )
        return out, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_normed: Tensor) -> tuple[Tensor | None, ...]:
        branch, bias, gain, seed, mean, rstd, out, next_gain, next_mean, next_rstd = ctx.saved_tensors
        rows, grads, above = (fused.as_rows(tensor) for tensor in (branch, grad_out, grad_normed))
        count, hidden = rows.shape
        shape = joined_launch(hidden)
        programs = fused.programs(shape, count, branch.device)
        grad_branch = torch.empty(branch.shape, dtype=branch.dtype, device=branch.device)
        grad_residual = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        wanted = [name for name, position in _PARTIALS.items() if ctx.needs_input_grad[position]]
        partials = torch.empty(len(wanted), programs, hidden, dtype=rstd.dtype, device=branch.device)
        partial = dict(zip(wanted, partials.unbind(), strict=True))
        with fused.device_of(branch):
            triton_kernels.norm_add_backward[(programs,)](
                grads,
                rows,
                bias,
                gain,
                seed,
                mean,
                rstd,
                grad_branch,
                *(partial.get(name) for name in ("gain_partials", "shift_partials", "bias_partials")),
                count,
                grads.stride(0),
                rows.stride(0),
                ctx.dropout,
                fused.scale(ctx.dropout),
                stages=shape.stages,
                grad_normed=above,
                out=out,
                next_gain=next_gain,
                next_mean=next_mean,
                next_rstd=next_rstd,
                grad_residual=grad_residual,
                next_gain_partials=partial.get("next_gain_partials"),
                next_shift_partials=partial.get("next_shift_partials"),
                normed_stride=above.stride(0),
                **fused.constants(shape, hidden, ctx.gain_offset, rstd.dtype),
            )
            sums = fused.sum_partials(partials, gain.dtype if _alike(bias, gain, next_gain) else rstd.dtype)
        of = {_PARTIALS[name]: total for name, total in zip(wanted, sums, strict=True)}
        parameters = {1: bias, 3: gain, 4: gain, 5: next_gain, 6: next_gain}
        for position, total in of.items():
            of[position] = total.to(parameters[position].dtype)
        grads_in = (grad_branch, of.get(1), grad_residual, *(of.get(position) for position in (3, 4, 5, 6)))
        return *grads_in, None, None, None, None, None


def _alike(*parameters: Tensor | None) -> bool:
    return len({tensor.dtype for tensor in parameters if tensor is not None}) == 1
