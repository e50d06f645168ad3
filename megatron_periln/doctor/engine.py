"""Transformer Engine on every GPU: its attention, norm and linear, forward and backward, beside plain torch.

A forward pass alone tells little: what cuDNN refuses it may refuse in the backward pass only.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from megatron_periln.cudnn import choose_attention
from megatron_periln.errors import with_kind

__all__ = ["Wanted", "find_failure"]

_RECIPES = {
    "delayed": "DelayedScaling",
    "tensorwise": "Float8CurrentScaling",
    "blockwise": "Float8BlockScaling",
    "mxfp8": "MXFP8BlockScaling",
}
"""Megatron's ``--fp8-recipe``, and Transformer Engine's classes (get_fp8_recipe of fp8_utils.py)."""

_HIDDEN, _TOKENS, _BATCH, _HEADS = 256, 128, 2, 4

_TOLERANCE = {"bfloat16": 0.05, "float16": 0.02, "float32": 0.01, "fp8": 0.2}
"""The largest difference over the largest value; fp32 products may be TF32's."""


@dataclass(frozen=True)
class Wanted:
    """What the flags of pretraining ask of Transformer Engine.

    Attributes
    ----------
    dtype
        Of the parameters; bfloat16 if there are no flags.
    recipe
        Megatron's name of the FP8 recipe, None without FP8.
    layer_norm
        Whether the norms are LayerNorms.
    local
        Whether Megatron's own layers are taken in its place.
    attention
        Megatron's ``--attention-backend``.
    """

    dtype: str = "bfloat16"
    recipe: str | None = None
    layer_norm: bool = False
    local: bool = False
    attention: str = "auto"

    @classmethod
    def by(cls, flags: Sequence[str]) -> Wanted:
        """Return what ``flags`` ask for, with Megatron's defaults."""
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--bf16", action="store_true")
        parser.add_argument("--fp16", action="store_true")
        parser.add_argument("--fp8-format")
        parser.add_argument("--fp8-recipe", default="delayed")
        parser.add_argument("--normalization", default="LayerNorm")
        parser.add_argument("--transformer-impl", default="transformer_engine")
        parser.add_argument("--attention-backend", default="auto")
        parser.add_argument("--num-layers")
        args = parser.parse_known_args(flags)[0]
        local, attention = args.transformer_impl == "local", args.attention_backend
        if args.num_layers is None and not (args.bf16 or args.fp16):  # they describe no model
            return cls(local=local, attention=attention)
        dtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
        recipe = args.fp8_recipe if args.fp8_format else None
        return cls(dtype, recipe, args.normalization == "LayerNorm", local, attention)

    def __str__(self) -> str:
        return self.dtype if self.recipe is None else f"{self.dtype}, FP8 {self.recipe}"


def find_failure(wanted: Wanted, device: str) -> str | None:
    """Return what of Transformer Engine fails on a device or computes something else, None if all is well."""
    # Both may crash; torch first, whose cuDNN is to be taken.
    import torch
    import transformer_engine.pytorch as te

    choose_attention(wanted.attention)
    dtype = getattr(torch, wanted.dtype)
    kind = "LayerNorm" if wanted.layer_norm else "RMSNorm"
    options = {"params_dtype": dtype, "device": device}
    norm = getattr(te, kind)(_HIDDEN, **options)
    fused = te.LayerNormLinear(_HIDDEN, _HIDDEN, bias=False, normalization=kind, **options)
    plain_norm = (
        (lambda x: torch.nn.functional.layer_norm(x, (_HIDDEN,)))
        if wanted.layer_norm
        else (lambda x: torch.nn.functional.rms_norm(x, (_HIDDEN,), eps=1e-5))
    )
    linear = te.Linear(_HIDDEN, _HIDDEN, bias=False, **options)
    attention = te.DotProductAttention(_HEADS, _HIDDEN // _HEADS, attention_dropout=0.0)
    tries: list[tuple[str, Callable[..., Any], Callable[..., Any], int]] = [
        ("attention", lambda *qkv: attention(*map(_heads, qkv)), _attention, 3),
        (kind, norm, plain_norm, 1),
        ("linear", linear, lambda x: x @ linear.weight.double().t(), 1),
        (f"{kind} and linear", fused, lambda x: plain_norm(x) @ fused.weight.double().t(), 1),
    ]
    if wanted.attention == "local":  # Megatron's own
        del tries[0]
    for name, function, plain, inputs in tries:
        low = wanted.recipe if "linear" in name and wanted.recipe in _RECIPES else None
        try:
            error = _difference(function, plain, inputs, device, dtype, _autocast(low))
        except Exception as failure:
            return f"{name}, {wanted}: {with_kind(failure, 300)}"
        if not error < _TOLERANCE["fp8" if low else wanted.dtype]:
            return f"{name}, {wanted}: {error:.1%} off plain torch"
    return None


def _autocast(recipe: str | None) -> AbstractContextManager[Any]:
    if recipe is None:
        return contextlib.nullcontext()
    # Transformer Engine, which may crash.
    import transformer_engine.common.recipe as recipes
    import transformer_engine.pytorch as te

    made = getattr(recipes, _RECIPES[recipe])()
    if hasattr(te, "autocast"):
        return te.autocast(enabled=True, recipe=made)
    return te.fp8_autocast(enabled=True, fp8_recipe=made)  # as it was called until 2.8


def _difference(
    function: Callable[..., Any],
    plain: Callable[..., Any],
    count: int,
    device: str,
    dtype: Any,
    context: AbstractContextManager[Any],
) -> float:
    """Return how far results and gradients of inputs are off those of ``plain``, in fp64."""
    import torch  # loaded by now

    generator = torch.Generator().manual_seed(1)
    shape = (_TOKENS, _BATCH, _HIDDEN)
    given = [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]
    grad = torch.randn(shape, generator=generator).to(dtype)
    mine = [tensor.to(device, copy=True).requires_grad_() for tensor in given]
    with context:
        out = function(*mine)
    out.backward(grad.to(device).view_as(out))
    exact = [tensor.to(device, torch.float64).requires_grad_() for tensor in given]
    expected = plain(*exact)
    expected.backward(grad.to(device, torch.float64).view_as(expected))
    pairs = [(out.view(shape), expected.view(shape))]
    pairs += [(a.grad, b.grad) for a, b in zip(mine, exact, strict=True)]
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def _heads(x: Any) -> Any:
    return x.view(_TOKENS, _BATCH, _HEADS, _HIDDEN // _HEADS)


def _attention(*qkv: Any) -> Any:
    """Attend causally, as plain torch does; ``[tokens, batch, hidden]``."""
    import torch  # loaded by now

    query, key, value = (_heads(x).permute(1, 2, 0, 3) for x in qkv)
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    later = torch.ones(_TOKENS, _TOKENS, dtype=torch.bool, device=scores.device).triu(1)
    out = scores.masked_fill(later, float("-inf")).softmax(-1) @ value
    return out.permute(2, 0, 1, 3).reshape(_TOKENS, _BATCH, _HIDDEN)
