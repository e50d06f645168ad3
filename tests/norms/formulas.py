"""The norms and the residual slots in fp64, from their formulas."""

import torch

NORMALIZATIONS = ["RMSNorm", "LayerNorm"]


def norm(x, gain, shift, eps, zero_centered_gamma=False):
    """RMSNorm, or LayerNorm with a ``shift``, of the last dimension."""
    x, gain = x.double(), gain.double() + zero_centered_gamma
    if shift is None:
        return gain * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return gain * (x - mean) / torch.sqrt(variance + eps) + shift.double()


def biased(branch, bias):
    return branch.double() if bias is None else branch.double() + bias.double()


def norm_add(branch, bias, residual, *parameters, mask=1.0):
    """``residual + mask * norm(branch + bias)``; ``mask`` is 0 or 1/(1-p) where there is dropout."""
    return residual.double() + mask * norm(biased(branch, bias), *parameters)


def add_norm(branch, bias, residual, *parameters, mask=1.0):
    """``norm(residual + mask * (branch + bias))``."""
    return norm(residual.double() + mask * biased(branch, bias), *parameters)


def inputs(*, bias=True, shift=True, dtype=torch.float32, hidden=48, rows=(6, 4), seed=3):
    """Return ``branch, bias, residual, gain, shift``; the bias is large, gains are far from 1."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = (
        0.3 * random(*rows, hidden) + 0.2,
        2 * random(hidden) + 0.5 if bias else None,
        1.5 * random(*rows, hidden),
        1 + 0.5 * random(hidden),
        random(hidden) if shift else None,
    )
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]
