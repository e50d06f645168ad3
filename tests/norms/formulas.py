"""The norms, and what stands for bias-dropout-add, in fp64, from their formulas."""

import torch

NORMALIZATIONS = ["RMSNorm", "LayerNorm"]


def norm(x, weight, bias, eps, zero_centered_gamma=False):
    """RMSNorm, or LayerNorm with a ``bias``, of the last dimension."""
    x, weight = x.double(), weight.double() + zero_centered_gamma
    if bias is None:
        return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return weight * (x - mean) / torch.sqrt(variance + eps) + bias.double()


def biased(sublayer_output, sublayer_bias):
    x = sublayer_output.double()
    return x if sublayer_bias is None else x + sublayer_bias.double()


def norm_add(sublayer_output, sublayer_bias, residual, *parameters, mask=1.0, scales=(1, 1)):
    """``a residual + b mask * norm(x)``, ``x`` with its bias; ``mask`` is 0 or 1/(1-p) where dropout is."""
    a, b = scales
    return a * residual.double() + b * mask * norm(biased(sublayer_output, sublayer_bias), *parameters)


def add_norm(sublayer_output, sublayer_bias, residual, *parameters, mask=1.0, scales=(1, 1)):
    """``norm(a residual + b mask * (sublayer_output + sublayer_bias))``."""
    a, b = scales
    return norm(a * residual.double() + b * mask * biased(sublayer_output, sublayer_bias), *parameters)


def inputs(*, sublayer_bias=True, layer_norm=True, dtype=torch.float32, hidden=48, rows=(6, 4), seed=3):
    """Return sublayer output and bias, residual, weight, bias: biases far from 0, weights from 1."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = (
        0.3 * random(*rows, hidden) + 0.2,
        2 * random(hidden) + 0.5 if sublayer_bias else None,
        1.5 * random(*rows, hidden),
        1 + 0.5 * random(hidden),
        random(hidden) if layer_norm else None,
    )
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]
