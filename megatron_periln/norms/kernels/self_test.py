"""Whether a backend computes on this device what it should: one small call, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_periln.norms.kernels.backends import Backend, choose_backend

__all__ = ["fault"]

_ROWS, _EPS = 16, 1e-5


def fault(
    backend: Backend,
    device: torch.device,
    hidden_size: int,
    dtype: torch.dtype,
    residual_dtype: torch.dtype,
    *,
    layer_norm: bool,
    zero_centered_gamma: bool,
    joined: bool,
) -> str | None:
    """Return what is wrong with a backend's output norm, None if nothing is.

    Parameters
    ----------
    backend
        Whose ``norm_add``, or ``norm_add_norm`` if ``joined``, is compared with plain torch's in fp64.
    device, hidden_size, dtype, residual_dtype, layer_norm, zero_centered_gamma
        Those of a model.
    """
    generator = torch.Generator().manual_seed(1)
    rows, vector = (_ROWS, hidden_size), (hidden_size,)
    branch, residual, grad = (torch.randn(rows, generator=generator).to(dtype) for _ in range(3))
    gain, shift = (torch.rand(vector, generator=generator).to(dtype) for _ in range(2))
    inputs = [branch, residual.to(residual_dtype), gain, *([shift] if layer_norm else [])]

    def results(backend: Backend, tensors: list[Tensor], normed: torch.dtype) -> list[Tensor]:
        leaves = [tensor.requires_grad_() for tensor in tensors]
        branch, residual, gain, shift = (*leaves, None)[:4]
        arguments = (branch, None, residual, gain, shift, _EPS, zero_centered_gamma, 0.0, True)
        outs: tuple[Tensor, ...]
        if joined:
            outs = backend.norm_add_norm(*arguments, gain, shift, _EPS, normed)
        else:
            outs = (backend.norm_add(*arguments),)
        grads = torch.autograd.grad(outs, leaves, [grad.to(out) for out in outs])
        return [*outs, *grads]

    try:
        mine = results(backend, [tensor.to(device, copy=True) for tensor in inputs], dtype)
        mine = [tensor.detach().cpu().double() for tensor in mine]
    except Exception as error:
        return f"fails here: {type(error).__name__}: {' '.join(str(error).split())}"
    plain = choose_backend("torch", "cpu", hidden_size).backend
    exact = results(plain, [tensor.double() for tensor in inputs], torch.float64)
    apart = [
        ((one - other).abs().max() / other.abs().max()).item() for one, other in zip(mine, exact, strict=True)
    ]
    bound = max(4 * torch.finfo(dtype).eps, 1e-4)
    wrong = [each for each in apart if not each < bound]
    return f"computes something else here, {max(wrong):.1%} off" if wrong else None
