"""What the norm kernels compute, in plain PyTorch: the specification of every faster backend.

All arithmetic is in fp32 (fp64 for fp64 inputs) whatever the dtypes of the tensors, and is
rounded once, to the dtype of the result. Nothing is written in place.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["add_norm", "norm", "norm_add", "norm_add_norm"]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def norm(
    x: Tensor,
    gain: Tensor,
    shift: Tensor | None,
    eps: float,
    zero_centered_gamma: bool,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """RMSNorm, or LayerNorm where there is a ``shift``, over the last dimension.

    Parameters
    ----------
    x
        Any shape ``[..., hidden]``.
    gain
        ``[hidden]``; with ``zero_centered_gamma`` the factor is ``1 + gain``.
    shift
        ``[hidden]`` for LayerNorm, None for RMSNorm.
    eps
        Added to the mean square (RMSNorm) or to the variance (LayerNorm).
    dtype
        Of the result; None keeps the arithmetic's.

    Returns
    -------
    Tensor
        The shape of ``x``.
    """
    gain = _wide(gain) + 1 if zero_centered_gamma else _wide(gain)
    if shift is None:
        normed = F.rms_norm(_wide(x), gain.shape, gain, eps)
    else:
        normed = F.layer_norm(_wide(x), gain.shape, gain, _wide(shift), eps)
    return normed if dtype is None else normed.to(dtype)


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
    """``residual + dropout(norm(branch + bias))``, in the dtype of ``residual``.

    ``branch`` and ``residual`` are ``[sequence, batch, hidden]``; ``bias`` is the branch's
    deferred linear bias ``[hidden]``, or None.
    """
    summed = _wide(branch) if bias is None else _wide(branch) + _wide(bias)
    normed = norm(summed, gain, shift, eps, zero_centered_gamma)
    return (_wide(residual) + F.dropout(normed, dropout, training)).to(residual.dtype)


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
    """`norm_add`, and the norm of its result that follows: in ``dtype``, with parameters of its own.

    ``next_shift`` is given where ``shift`` is.
    """
    out = norm_add(branch, bias, residual, gain, shift, eps, zero_centered_gamma, dropout, training)
    return out, norm(out, next_gain, next_shift, next_eps, zero_centered_gamma, dtype)


def add_norm(
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
    """``norm(residual + dropout(branch + bias))``, in the dtype of ``residual``.

    Shapes are those of `norm_add`.
    """
    summed = _wide(branch) if bias is None else _wide(branch) + _wide(bias)
    stream = _wide(residual) + F.dropout(summed, dropout, training)
    return norm(stream, gain, shift, eps, zero_centered_gamma).to(residual.dtype)
