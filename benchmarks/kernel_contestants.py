"""Who can compute a norm and a residual add: ours, and those of other libraries that are installed."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_periln.norms import kernels

__all__ = ["EPS", "NormAdd", "add_norm_contestants", "norm_add_contestants", "norm_add_norm_contestants"]

EPS = 1e-5

NormAdd = Callable[[Tensor, Tensor, Tensor], Any]
"""From sublayer output and residual ``[rows, hidden]`` and weight ``[hidden]`` to the result, or the two."""


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _ours(name: str, function: str, device_type: str, hidden_size: int) -> Callable[..., Any]:
    backend = kernels.choose_backend(name, device_type, hidden_size).backend
    compute = getattr(backend, function)

    def norm_add(x: Tensor, residual: Tensor, weight: Tensor, scales: Sequence[Tensor] = ()) -> Any:
        return compute(x, None, residual, weight, None, EPS, False, 0.0, True, *scales)

    return norm_add


def _learned(name: str, device_type: str, hidden_size: int) -> NormAdd:
    """Return ours with two learned scales, whose gradients belong to the backward pass that is timed."""
    compute = _ours(name, "norm_add", device_type, hidden_size)
    scales = [torch.ones(1, dtype=torch.bfloat16, device=device_type).requires_grad_() for _ in range(2)]
    return functools.partial(compute, scales=scales)


def _residual_add() -> NormAdd:
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add

    add = get_bias_dropout_add(True, True)
    return lambda x, residual, _: add((x, None), residual, 0.0)


def _after(norm: Callable[[Tensor, Tensor], Tensor]) -> NormAdd:
    add = _residual_add()
    return lambda x, residual, weight: add(norm(x, weight), residual, weight)


def _transformer_engine_norm(hidden_size: int) -> Callable[[Tensor, Tensor], Tensor]:
    import transformer_engine.pytorch as te

    module = te.RMSNorm(hidden_size, eps=EPS, params_dtype=torch.bfloat16, device="cuda")

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        module.weight = weight
        return module(x)

    return norm


def norm_add_contestants(device_type: str, hidden_size: int) -> dict[str, NormAdd]:
    """Return who computes ``residual + norm(x)``, after Pre-LN's plain add, which sets the floor."""
    contestants = {"Pre-LN's residual add": _residual_add()}
    for name in ("triton", "compile", "torch"):
        contestants[f"norm_add, {name}"] = _ours(name, "norm_add", device_type, hidden_size)
    # Without a sum of partial gradients, and its kernel: what these take is the difference.
    triton = contestants["norm_add, triton"]
    contestants["norm_add, triton, weight frozen"] = lambda x, residual, weight: triton(
        x, residual, weight.detach()
    )
    for name in ("triton", "compile"):
        contestants[f"norm_add, {name}, learned scales"] = _learned(name, device_type, hidden_size)
    if device_type != "cuda":
        return contestants
    if _has("transformer_engine"):
        contestants["Transformer Engine, then add"] = _after(_transformer_engine_norm(hidden_size))
    if _has("liger_kernel"):
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        contestants["Liger, then add"] = _after(
            lambda x, weight: LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False)
        )
    contestants["F.rms_norm, then add"] = _after(lambda x, weight: F.rms_norm(x, weight.shape, weight, EPS))
    return contestants


def norm_add_norm_contestants(device_type: str, hidden_size: int) -> dict[str, NormAdd]:
    """Return who computes ``residual + norm(x)`` and the norm of that."""
    if hidden_size > kernels.MAX_NORM_ADD_NORM_HIDDEN_SIZE:
        return {}

    def ours(name: str) -> NormAdd:
        backend = kernels.choose_backend(name, device_type, hidden_size).backend
        return lambda x, residual, weight: backend.norm_add_norm(
            x, None, residual, weight, None, EPS, False, 0.0, True, weight, None, EPS, x.dtype
        )

    contestants = {f"norm_add_norm, {name}": ours(name) for name in ("triton", "compile", "torch")}
    if device_type == "cuda" and _has("transformer_engine"):
        norm = _transformer_engine_norm(hidden_size)
        fused = _ours("triton", "norm_add", device_type, hidden_size)

        def then_norm(norm_add: NormAdd) -> NormAdd:
            def both(sublayer_output: Tensor, residual: Tensor, weight: Tensor) -> Any:
                out = norm_add(sublayer_output, residual, weight)
                return out, norm(out, weight)

            return both

        contestants["norm_add, then Transformer Engine"] = then_norm(fused)
        contestants["Pre-LN: add, then Transformer Engine"] = then_norm(_residual_add())
    return contestants


def add_norm_contestants(device_type: str, hidden_size: int) -> dict[str, NormAdd]:
    """Return who computes ``norm(residual + x)``, Post-LN."""
    contestants = {
        f"add_norm, {name}": _ours(name, "add_norm", device_type, hidden_size)
        for name in ("compile", "torch")
    }
    if device_type != "cuda":
        return contestants
    if _has("flash_attn.ops.triton.layer_norm"):
        from flash_attn.ops.triton.layer_norm import layer_norm_fn

        contestants["flash-attn"] = lambda x, residual, weight: layer_norm_fn(
            x, weight, None, residual=residual, eps=EPS, is_rms_norm=True
        )
    if _has("liger_kernel"):
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

        contestants["Liger"] = lambda x, residual, weight: LigerFusedAddRMSNormFunction.apply(
            x, residual, weight, EPS, 0.0, "llama", False
        )[0]
    return contestants
