"""Transformer Engine as the doctor calls it, in plain torch; with faults."""

from __future__ import annotations

import contextlib
import os
import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

BAD_PARAM = (
    "/TransformerEngine/transformer_engine/common/fused_attn/fused_attn_f16_arbitrary_seqlen.cu:1043 in "
    "function operator(): cuDNN Error: CUDNN_BACKEND_OPERATION: SetAttribute "
    "CUDNN_ATTR_OPERATION_RESHAPE_MODE Failed. For more information, enable cuDNN error logging."
)
"""What the attention says in its backward pass beside a cuDNN that is too old."""


class _FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Tensor:
        raise RuntimeError(BAD_PARAM)


class DotProductAttention(nn.Module):
    fails = False

    def __init__(self, heads: int, channels: int, attention_dropout: float = 0.1) -> None:
        super().__init__()
        assert attention_dropout == 0

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads = [x.permute(1, 2, 0, 3) for x in (query, key, value)]
        out = F.scaled_dot_product_attention(*heads, is_causal=True).permute(2, 0, 1, 3).flatten(2)
        by_cudnn = os.environ["NVTE_FUSED_ATTN"] == "1"
        return _FailsBackward.apply(out) if self.fails and by_cudnn else out


class Linear(nn.Module):
    off = 0.0

    def __init__(self, inputs: int, outputs: int, bias: bool, params_dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.05 * torch.randn(outputs, inputs, dtype=params_dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return (1 + self.off) * F.linear(x, self.weight)


class RMSNorm(nn.Module):
    def __init__(self, hidden: int, params_dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.hidden,), eps=1e-5)


class LayerNorm(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.hidden,))


class LayerNormLinear(Linear):
    def __init__(self, inputs: int, outputs: int, normalization: str, **options: Any) -> None:
        super().__init__(inputs, outputs, **options)
        self.norm = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}[normalization](
            inputs, options["params_dtype"], options["device"]
        )

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


def install(monkeypatch: pytest.MonkeyPatch, *, fails: bool = False, off: float = 0.0) -> list[str]:
    """Make it what ``import transformer_engine`` finds; return the FP8 recipes that are asked for."""
    for name in ("FLASH", "FUSED", "UNFUSED"):
        monkeypatch.setenv(f"NVTE_{name}_ATTN", "")  # and back to what it was
        monkeypatch.delenv(f"NVTE_{name}_ATTN")
    monkeypatch.setattr(DotProductAttention, "fails", fails)
    monkeypatch.setattr(Linear, "off", off)
    asked: list[str] = []

    @contextlib.contextmanager
    def autocast(enabled: bool, recipe: Any) -> Any:
        assert enabled
        asked.append(type(recipe).__name__)
        yield

    engine = types.ModuleType("transformer_engine.pytorch")
    for part in (DotProductAttention, Linear, RMSNorm, LayerNorm, LayerNormLinear, autocast):
        setattr(engine, part.__name__, part)
    recipe = types.ModuleType("transformer_engine.common.recipe")
    for name in ("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling"):
        setattr(recipe, name, type(name, (), {}))
    modules = {"transformer_engine": types.ModuleType("transformer_engine")}
    modules |= {"transformer_engine.common": types.ModuleType("transformer_engine.common")}
    modules |= {engine.__name__: engine, recipe.__name__: recipe}
    modules["transformer_engine"].pytorch = engine  # type: ignore[attr-defined]
    modules["transformer_engine.common"].recipe = recipe  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return asked
