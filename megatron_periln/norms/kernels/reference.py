"""What the norm kernels compute, in plain PyTorch: the specification of every faster backend.

All arithmetic is in the compute dtype, fp32 (fp64 for fp64 inputs), whatever the dtypes of the tensors, and
is rounded once, to the dtype of the result. Nothing is written in place.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Scale",
    "add",
    "add_norm",
    "gate_scales",
    "gpas",
    "gpas_part",
    "norm",
    "norm_add",
    "norm_add_norm",
]

Scale = float | Tensor
"""A constant, or a tensor: of one element, or of one a channel, ``[hidden]``."""

_GATE_TEMPERATURE = 0.3
_LEAST_SQUARE = 1e-3


def _to_compute_dtype(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _scaled(x: Tensor, scale: Scale) -> Tensor:
    """Multiply ``x`` in its own dtype; by the constant 1 it is no operation."""
    if isinstance(scale, Tensor):
        return scale.to(x.dtype) * x
    return x if scale == 1.0 else scale * x


def _weighted_sum(residual: Tensor, y: Tensor, residual_scale: Scale, output_scale: Scale) -> Tensor:
    """``residual_scale * residual + output_scale * y`` in the compute dtype; at 1 and 1 the plain sum."""
    return _scaled(_to_compute_dtype(residual), residual_scale) + _scaled(y, output_scale)


def norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    zero_centered_gamma: bool,
    dtype: torch.dtype | None = None,
    scale: float = 1.0,
) -> Tensor:
    """RMSNorm, or LayerNorm where there is a ``bias``, over the last dimension.

    Parameters
    ----------
    x
        Any shape ``[..., hidden]``.
    weight
        ``[hidden]``; with ``zero_centered_gamma`` the factor is ``1 + weight``.
    bias
        ``[hidden]`` for LayerNorm, None for RMSNorm.
    eps
        Added to the mean square (RMSNorm) or to the variance (LayerNorm).
    dtype
        Of the result; None keeps the compute dtype.
    scale
        What the result is multiplied by, before it is rounded.

    Returns
    -------
    Tensor
        The shape of ``x``.
    """
    weight = _to_compute_dtype(weight) + 1 if zero_centered_gamma else _to_compute_dtype(weight)
    if bias is None:
        normed = F.rms_norm(_to_compute_dtype(x), weight.shape, weight, eps)
    else:
        normed = F.layer_norm(_to_compute_dtype(x), weight.shape, weight, _to_compute_dtype(bias), eps)
    if scale != 1.0:
        normed = scale * normed
    return normed if dtype is None else normed.to(dtype)


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
    residual_scale: Scale = 1.0,
    output_scale: Scale = 1.0,
) -> Tensor:
    """Return ``a * residual + b * dropout(norm(sublayer_output + sublayer_bias))`` in ``residual``'s dtype.

    Parameters
    ----------
    sublayer_output, residual
        ``[sequence, batch, hidden]``: what attention or the MLP returned, and the residual stream.
    sublayer_bias
        The bias ``[hidden]`` of the sublayer's last linear, which Megatron leaves to be added here; or None.
    weight, bias, eps, zero_centered_gamma
        The norm, as in `norm`.
    dropout, training
        The probability that an element of the normed sublayer output is dropped, while training.
    residual_scale, output_scale
        ``a`` and ``b``.
    """
    x = _to_compute_dtype(sublayer_output)
    if sublayer_bias is not None:
        x = x + _to_compute_dtype(sublayer_bias)
    normed = norm(x, weight, bias, eps, zero_centered_gamma)
    y = F.dropout(normed, dropout, training)
    return _weighted_sum(residual, y, residual_scale, output_scale).to(residual.dtype)


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
    residual_scale: Scale = 1.0,
    output_scale: Scale = 1.0,
) -> tuple[Tensor, Tensor]:
    """`norm_add`, and the next norm of its result: in ``next_dtype``, with parameters of its own.

    ``next_bias`` is given where ``bias`` is; ``zero_centered_gamma`` holds for both norms.
    """
    scales = (residual_scale, output_scale)
    settings = (eps, zero_centered_gamma, dropout, training, *scales)
    out = norm_add(sublayer_output, sublayer_bias, residual, weight, bias, *settings)
    return out, norm(out, next_weight, next_bias, next_eps, zero_centered_gamma, next_dtype)


def add_norm(
    sublayer_output: Tensor,
    sublayer_bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    zero_centered_gamma: bool,
    dropout: float,
    training: bool,
    residual_scale: Scale = 1.0,
    output_scale: Scale = 1.0,
) -> Tensor:
    """Return ``norm(a * residual + b * dropout(sublayer_output + sublayer_bias))`` in ``residual``'s dtype.

    Parameters are those of `norm_add`; dropout acts before the norm.
    """
    x = _to_compute_dtype(sublayer_output)
    if sublayer_bias is not None:
        x = x + _to_compute_dtype(sublayer_bias)
    total = _weighted_sum(residual, F.dropout(x, dropout, training), residual_scale, output_scale)
    return norm(total, weight, bias, eps, zero_centered_gamma).to(residual.dtype)


def add(
    sublayer_output: Tensor,
    sublayer_bias: Tensor | None,
    residual: Tensor,
    dropout: float,
    training: bool,
    residual_scale: Scale = 1.0,
    output_scale: Scale = 1.0,
) -> Tensor:
    """Return ``a * residual + b * dropout(sublayer_output + sublayer_bias)`` in ``residual``'s dtype.

    Parameters are those of `norm_add`.
    """
    x = _to_compute_dtype(sublayer_output)
    if sublayer_bias is not None:
        x = x + _to_compute_dtype(sublayer_bias)
    y = F.dropout(x, dropout, training)
    return _weighted_sum(residual, y, residual_scale, output_scale).to(residual.dtype)


def gpas_part(gate: Tensor) -> Tensor:
    """Return ``SiLU(gate)``: which part of its input `gpas` takes off."""
    return F.silu(gate)


def gpas(x: Tensor, gate: Tensor) -> Tensor:
    """Return ``(1 - SiLU(gate)) x``, whose gradient reaches ``x`` as if it were ``x`` itself.

    Chen et al., "GPAS: Accelerating Convergence of LLM Pretraining via Gradient-Preserving Activation
    Scaling", NeurIPS 2025 (arXiv 2506.22049).

    Parameters
    ----------
    x
        Any shape.
    gate
        A parameter of one element.
    """
    wide = _to_compute_dtype(x)
    return (wide - gpas_part(gate.to(wide.dtype)) * wide.detach()).to(x.dtype)


def gate_scales(gate: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``a`` and ``b`` of each channel, with ``b = sigmoid(gate / 0.3)`` and ``a^2 = 1 - b^2``.

    The residual gates of Muse, as transformers 5.23 has them
    (transformers/models/muse_spark/modeling_muse_spark.py); ``a^2`` is 0.001 at least.

    Parameters
    ----------
    gate
        A parameter, ``[hidden]``.

    Returns
    -------
    Two tensors ``[hidden]``, in the dtype that sums are computed in.
    """
    wide = _to_compute_dtype(gate) / _GATE_TEMPERATURE
    b = torch.sigmoid(wide)
    # 1 - b is the sigmoid of the other sign, which keeps its digits where b is almost 1.
    return (torch.sigmoid(-wide) * (1 + b)).clamp_min(_LEAST_SQUARE).sqrt(), b
