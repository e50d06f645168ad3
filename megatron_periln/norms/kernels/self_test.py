"""Whether a backend computes on this device what it should: one small call, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_periln.errors import with_kind
from megatron_periln.norms.kernels.backends import Backend, choose_backend

__all__ = ["find_failure"]

_ROWS, _EPS = 16, 1e-5


def find_failure(
    backend: Backend,
    device: torch.device,
    hidden_size: int,
    dtype: torch.dtype,
    residual_dtype: torch.dtype,
    *,
    layer_norm: bool,
    zero_centered_gamma: bool,
    with_next: bool,
    scaled: bool = False,
    learned: str = "",
) -> str | None:
    """Return what is wrong with a backend's output norm, None if nothing is.

    Parameters
    ----------
    backend
        Whose ``norm_add``, or ``norm_add_norm`` if ``with_next``, is compared with plain torch's in fp64.
    device, hidden_size, dtype, residual_dtype, layer_norm, zero_centered_gamma
        Those of a model.
    scaled
        Whether it has scales of the residual stream and of what is added.
    learned
        What it learns, as a placement says: ``scales`` of one number each, or of one a channel, of ``gates``.
    """
    generator = torch.Generator().manual_seed(1)
    rows, vector = (_ROWS, hidden_size), (hidden_size,)
    sublayer_output, residual, grad = (torch.randn(rows, generator=generator).to(dtype) for _ in range(3))
    weight, bias = (torch.rand(vector, generator=generator).to(dtype) for _ in range(2))
    constants = (0.5, 2.0) if scaled else ()
    inputs = [sublayer_output, residual.to(residual_dtype), weight, *([bias] if layer_norm else [])]
    if size := {"scales": 1, "gates": hidden_size}.get(learned, 0):
        inputs += [torch.rand(size, generator=generator).to(dtype) + 0.5 for _ in range(2)]

    def results(backend: Backend, tensors: list[Tensor], next_dtype: torch.dtype) -> list[Tensor]:
        leaves = [tensor.requires_grad_() for tensor in tensors]
        sublayer_output, residual, weight = leaves[:3]
        bias = leaves[3] if layer_norm else None
        scales = leaves[-2:] if size else constants
        arguments = (sublayer_output, None, residual, weight, bias, _EPS, zero_centered_gamma, 0.0, True)
        outs: tuple[Tensor, ...]
        if with_next:
            outs = backend.norm_add_norm(*arguments, weight, bias, _EPS, next_dtype, *scales)
        else:
            outs = (backend.norm_add(*arguments, *scales),)
        grads = torch.autograd.grad(outs, leaves, [grad.to(out) for out in outs])
        return [*outs, *grads]

    try:
        mine = results(backend, [tensor.to(device, copy=True) for tensor in inputs], dtype)
        mine = [tensor.detach().cpu().double() for tensor in mine]
    except Exception as error:
        return f"fails here: {with_kind(error)}"
    plain = choose_backend("torch", "cpu", hidden_size).backend
    exact = results(plain, [tensor.double() for tensor in inputs], torch.float64)
    errors = [
        ((one - other).abs().max() / other.abs().max()).item() for one, other in zip(mine, exact, strict=True)
    ]
    bound = max(4 * torch.finfo(dtype).eps, 1e-4)
    wrong = [error for error in errors if not error < bound]  # NaN is wrong too
    return f"computes something else here, {max(wrong):.1%} off" if wrong else None
