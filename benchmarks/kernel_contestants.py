"""Who can compute a norm and a residual add: ours, and those of other libraries that are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_periln.norms import kernels

__all__ = ["EPS", "Join", "add_norm_contestants", "norm_add_contestants", "norm_add_norm_contestants"]

EPS = 1e-5

Join = Callable[[Tensor, Tensor, Tensor], Any]
"""From branch and residual ``[rows, hidden]`` and the gain ``[hidden]`` to the result, or the two results."""


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _ours(name: str, function: str, device_type: str, hidden_size: int) -> Join:
    backend = kernels.choose_backend(name, device_type, hidden_size).backend
    join = getattr(backend, function)
    return lambda branch, residual, gain: join(branch, None, residual, gain, None, EPS, False, 0.0, True)


def _residual_add() -> Join:
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add

    add = get_bias_dropout_add(True, True)
    return lambda branch, residual, _: add((branch, None), residual, 0.0)


def _after(norm: Callable[[Tensor, Tensor], Tensor]) -> Join:
    add = _residual_add()
    return lambda branch, residual, gain: add(norm(branch, gain), residual, gain)


def _transformer_engine_norm(hidden_size: int) -> Callable[[Tensor, Tensor], Tensor]:
    import transformer_engine.pytorch as te

    module = te.RMSNorm(hidden_size, eps=EPS, params_dtype=torch.bfloat16, device="cuda")

    def norm(branch: Tensor, gain: Tensor) -> Tensor:
        module.weight = gain
        return module(branch)

    return norm


def norm_add_contestants(device_type: str, hidden_size: int) -> dict[str, Join]:
    """Return who computes ``residual + norm(branch)``, after Pre-LN's plain add, which sets the floor."""
    contestants = {"Pre-LN's residual add": _residual_add()}
    for name in ("triton", "compile", "torch"):
        contestants[f"norm_add, {name}"] = _ours(name, "norm_add", device_type, hidden_size)
    if device_type != "cuda":
        return contestants
    if _has("transformer_engine"):
        contestants["Transformer Engine, then add"] = _after(_transformer_engine_norm(hidden_size))
    if _has("liger_kernel"):
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        contestants["Liger, then add"] = _after(
            lambda branch, gain: LigerRMSNormFunction.apply(branch, gain, EPS, 0.0, "llama", False)
        )
    contestants["F.rms_norm, then add"] = _after(
        lambda branch, gain: F.rms_norm(branch, gain.shape, gain, EPS)
    )
    return contestants


def norm_add_norm_contestants(device_type: str, hidden_size: int) -> dict[str, Join]:
    """Return who computes ``residual + norm(branch)`` and the norm of that."""
    if hidden_size > kernels.MAX_JOINED_HIDDEN_SIZE:
        return {}

    def joined(name: str) -> Join:
        backend = kernels.choose_backend(name, device_type, hidden_size).backend
        return lambda branch, residual, gain: backend.norm_add_norm(
            branch, None, residual, gain, None, EPS, False, 0.0, True, gain, None, EPS, branch.dtype
        )

    contestants = {f"norm_add_norm, {name}": joined(name) for name in ("triton", "compile", "torch")}
    if device_type == "cuda" and _has("transformer_engine"):
        norm, add = _transformer_engine_norm(hidden_size), _residual_add()
        fused = _ours("triton", "norm_add", device_type, hidden_size)

        def then_norm(join: Join) -> Join:
            def both(branch: Tensor, residual: Tensor, gain: Tensor) -> Any:
                out = join(branch, residual, gain)
                return out, norm(out, gain)

            return both

        contestants["norm_add, then Transformer Engine"] = then_norm(fused)
        contestants["Pre-LN: add, then Transformer Engine"] = then_norm(
            lambda branch, residual, _: add((branch, None), residual, 0.0)
        )
    return contestants


def add_norm_contestants(device_type: str, hidden_size: int) -> dict[str, Join]:
    """Return who computes ``norm(residual + branch)``, Post-LN."""
    contestants = {
        f"add_norm, {name}": _ours(name, "add_norm", device_type, hidden_size)
        for name in ("compile", "torch")
    }
    if device_type != "cuda":
        return contestants
    if _has("flash_attn.ops.triton.layer_norm"):
        from flash_attn.ops.triton.layer_norm import layer_norm_fn

        contestants["flash-attn"] = lambda branch, residual, gain: layer_norm_fn(
            branch, gain, None, residual=residual, eps=EPS, is_rms_norm=True
        )
    if _has("liger_kernel"):
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

        contestants["Liger"] = lambda branch, residual, gain: LigerFusedAddRMSNormFunction.apply(
            branch, residual, gain, EPS, 0.0, "llama", False
        )[0]
    return contestants
