"""What Transformer Engine and the kernels of a GPU keep, where the model is built without them.

The model is that of Megatron's local layers, which has the same parameters. In the place of what they compute
stand functions that make the tensors of the same shapes, and keep for the backward pass what the kernels of a
GPU keep. `RULES` says of each where that is written.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from megatron.core.fusions import fused_bias_swiglu, fused_cross_entropy
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor

from megatron_periln.models.local_attention import LocalAttention
from megatron_periln.norms.kernels import backends

__all__ = ["ENGINE", "RULES", "Rule", "standing_in"]

ENGINE = "2.17.1"
"""The version of Transformer Engine whose files the rules are of."""


@dataclass(frozen=True)
class Rule:
    """What one kernel keeps.

    Attributes
    ----------
    of
        The kernel.
    keeps
        For the backward pass.
    source
        Where that is written.
    """

    of: str
    keeps: str
    source: str


_TE = f"Transformer Engine {ENGINE}, transformer_engine/pytorch"

RULES: tuple[Rule, ...] = (
    Rule(
        "fused or flash attention",
        "queries, keys and values, each contiguous, the output, and one fp32 number a query and head; no "
        "scores; dropout's mask is computed again",
        f"{_TE}/cpp_extensions/fused_attn.py, fused_attn_fwd: softmax statistics [batch, heads, sequence, 1]",
    ),
    Rule(
        "RMSNorm, LayerNorm",
        "the input, the weight, and one (RMSNorm) or two (LayerNorm) fp32 numbers a row",
        f"{_TE}/module/layernorm_linear.py, _LayerNormLinear.forward: inputmat, rsigma, mu",
    ),
    Rule(
        "linear in bf16 and fp16",
        "the input, this rank's part of the sequence with sequence parallelism, and the weight",
        f"{_TE}/module/linear.py, _Linear.forward: saved_inputmat",
    ),
    Rule(
        "linear in FP8",
        "the input in one byte an element; the norm's input beside it in bf16",
        f"{_TE}/module/linear.py, _Linear.forward: saved_inputmat, columnwise only",
    ),
    Rule(
        "weights in FP8",
        "beside those in bf16 one copy by rows and one by columns, one byte an element each, cached from the "
        "first microbatch on; with --fp8-param-gather in the place of bf16",
        f"{_TE}/module/base.py, get_weight_workspace: _fp8_workspaces",
    ),
    Rule(
        "gradient-accumulation fusion",
        "one bf16 tensor in the shape of a weight for all weights of that shape; gradients are added to the "
        "main gradient in place",
        f"{_TE}/module/base.py, get_dummy_wgrad",
    ),
    Rule(
        "output norm",
        "the sublayer's output, the weight, and one or two fp32 numbers a row; with --fuse-pre-mlp-norm the "
        "sum instead of the norm's input; the residual stream too for learned scales",
        "megatron_periln/norms/kernels/fused.py, _NormAdd.forward",
    ),
    Rule(
        "rotary embedding, fused",
        "the angles alone",
        f"{_TE}/attention/rope.py, FusedRoPEFunc.forward",
    ),
    Rule(
        "SwiGLU, compiled",
        "its input; no intermediate values while it runs",
        "megatron/core/fusions/fused_bias_swiglu.py, megatron-core 0.19.2",
    ),
    Rule(
        "cross entropy, compiled",
        "the softmax in fp32; while it is computed, beside it the logits twice, as they are and in fp32, for "
        "compiled functions don't write into what they read",
        "megatron/core/fusions/fused_cross_entropy.py, megatron-core 0.19.2; the peak that an H100 showed",
    ),
)
"""Each of what stands in."""


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        length, batch, heads, _ = query.shape
        out = query.new_empty(length, batch, heads, value.shape[-1])
        ctx.save_for_backward(
            query, key, value, out, query.new_empty(batch, heads, length, dtype=torch.float32)
        )
        return out.view(length, batch, -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _attend(self: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    return _Attention.apply(query, key, value)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None
    ) -> Tensor:
        rows = x.numel() // x.shape[-1]
        statistics = x.new_empty(rows * (1 if bias is None else 2), dtype=torch.float32)
        ctx.save_for_backward(x, weight, statistics)
        ctx.biased = bias is not None
        return torch.empty_like(x, dtype=dtype or x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, _ = ctx.saved_tensors
        bias = torch.empty_like(weight) if ctx.biased else None
        return torch.empty_like(x), torch.empty_like(weight), bias, None


def _normed(x: Tensor, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype | None = None) -> Any:
    if weight is None:
        weight = x.new_empty(x.shape[-1])
    return _Norm.apply(x, weight, bias, dtype)


class _NormAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, residual: Tensor, weight: Tensor, *others: Tensor | None) -> Any:
        """``others`` are the sublayer's bias, the norm's, the next norm's weight and bias, learned scales."""
        next_weight = others[2] if len(others) > 2 else None
        rows = residual.numel() // residual.shape[-1]
        layer_norm = others[1] is not None
        numbers = (2 if layer_norm else 1) * (1 if next_weight is None else 2)
        total = torch.empty_like(residual)
        statistics = residual.new_empty(rows * numbers, dtype=torch.float32)
        kept = [] if next_weight is None else [total]
        kept += [residual] if len(others) > 4 else []
        ctx.save_for_backward(output, weight, statistics, *kept)
        ctx.given = [None if other is None else (other.shape, other.dtype) for other in others]
        if next_weight is None:
            return total
        return total, torch.empty_like(total, dtype=next_weight.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        output, weight, *_ = ctx.saved_tensors
        others = [
            None if given is None else weight.new_empty(given[0], dtype=given[1]) for given in ctx.given
        ]
        return torch.empty_like(output), gradient, torch.empty_like(weight), *others


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, output: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, of: Tensor | None
    ) -> Tensor:
        """Keep what the compiled kernel keeps: what it reads, and a number or two a row."""
        rows = residual.numel() // residual.shape[-1]
        ctx.save_for_backward(output, residual, weight, residual.new_empty(rows, dtype=torch.float32))
        ctx.given = [None if other is None else other.shape for other in (bias, of)]
        return torch.empty_like(residual)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        output, residual, weight, _ = ctx.saved_tensors
        others = [None if shape is None else weight.new_empty(shape) for shape in ctx.given]
        return torch.empty_like(output), torch.empty_like(residual), torch.empty_like(weight), *others


def _norm(
    x: Tensor, weight: Tensor, bias: Any, eps: float, zero_centered: bool, dtype: Any = None, *_: Any
) -> Tensor:
    return _normed(x, weight, bias, dtype)


def _norm_add(output: Tensor, of: Any, residual: Tensor, weight: Tensor, bias: Any, *rest: Any) -> Any:
    learned = [scale for scale in rest if isinstance(scale, Tensor)]
    return _NormAdd.apply(output, residual, weight, of, bias, *([None, None, *learned] if learned else []))


def _norm_add_norm(output: Tensor, of: Any, residual: Tensor, weight: Tensor, bias: Any, *rest: Any) -> Any:
    return _NormAdd.apply(output, residual, weight, of, bias, rest[4], rest[5])


def _add_norm(output: Tensor, of: Any, residual: Tensor, weight: Tensor, bias: Any, *_: Any) -> Any:
    return _AddNorm.apply(output, residual, weight, bias, of)


_KERNELS = backends.Backend("of the plan", _norm, _norm_add, _add_norm, _norm_add_norm)


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, angles: Tensor) -> Tensor:
        ctx.save_for_backward(angles)
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return torch.empty_like(gradient), None


def _rotate(t: Tensor, freqs: Tensor, *_: Any, **__: Any) -> Tensor:
    return _Rotated.apply(t, freqs)


def _half(y: Tensor, *_: Any) -> Tensor:
    return y.new_empty(*y.shape[:-1], y.shape[-1] // 2)


def _weighted_back(g: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(y), torch.empty_like(weights)


def _predicted(logits: Tensor, target: Tensor, *_: Any) -> tuple[Tensor, ...]:
    flat = target.reshape(-1)
    return (
        torch.empty_like(target, dtype=torch.bool),
        torch.empty_like(flat),
        logits.new_empty(2 * target.shape[0], *target.shape[1:]),
        torch.empty_like(logits),
    )


def _loss(exponentials: Tensor, both: Tensor) -> tuple[Tensor, Tensor]:
    return exponentials, both.new_empty(both.shape[0] // 2, *both.shape[1:])


def _logits_max(logits: Tensor) -> tuple[Tensor, Tensor]:
    return logits.float(), logits.new_empty(logits.shape[:-1], dtype=torch.float32)


def _logits_gradient(softmax: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(softmax, dtype=torch.bfloat16)


class _NoGemms:
    """In the place of Apex's or Transformer Engine's GEMMs that add to the main gradient."""

    @staticmethod
    def wgrad_gemm_accum_fp32(*_: Any) -> None: ...

    @staticmethod
    def wgrad_gemm_accum_fp16(*_: Any) -> None: ...


class _Eight(torch.autograd.Function):
    """A linear in FP8, of `layers.LinearWithGradAccumulationAndAsyncCommunication`'s arguments."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        sequence_parallel, group = rest[2], rest[5]
        ctx.save_for_backward(torch.empty_like(x, dtype=torch.uint8), weight)
        ctx.size = group.size() if sequence_parallel else 1
        ctx.dtype, ctx.bias = x.dtype, None if bias is None else bias.shape
        whole = x.new_empty(x.shape[0] * ctx.size, *x.shape[1:], dtype=torch.uint8)
        return x.new_empty(*whole.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight = ctx.saved_tensors
        cast = torch.empty_like(gradient, dtype=torch.uint8)
        whole = kept.new_empty(kept.shape[0] * ctx.size, *kept.shape[1:])
        full = torch.empty_like(whole, dtype=ctx.dtype)
        part = full if ctx.size == 1 else torch.empty_like(kept, dtype=ctx.dtype)
        del cast, whole
        weight.grad_added_to_main_grad = True
        dummy = _DUMMIES.of(weight)
        return part, dummy, None if ctx.bias is None else gradient.new_empty(ctx.bias), *[None] * 7


class _Dummies:
    def __init__(self) -> None:
        self.made: dict[tuple[int, ...], Tensor] = {}

    def of(self, weight: Tensor) -> Tensor:
        return self.get(list(weight.shape), weight.dtype)

    def get(self, shape: list[int], dtype: torch.dtype, zero: bool = False) -> Tensor:
        """Stand for ``get_dummy_wgrad``."""
        return self.made.setdefault(tuple(shape), torch.empty(shape, dtype=dtype)).detach()


_DUMMIES = _Dummies()
_LINEAR = layers.LinearWithGradAccumulationAndAsyncCommunication


class _Linears:
    """`layers.LinearWithGradAccumulationAndAsyncCommunication`, of which weights in FP8 have their own."""

    @staticmethod
    def apply(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        function = _Eight if getattr(weight, "in_fp8", False) else _LINEAR
        return function.apply(x, weight, *rest)


@contextmanager
def standing_in(args: Namespace) -> Iterator[None]:
    """Have what the layers of ``args`` run on a GPU stand in for what they run here, until the end.

    Parameters
    ----------
    args
        The run's, validated, as they are for its GPUs; with ``--device cpu`` nothing stands in.
    """
    if args.device == "cpu":
        yield
        return
    with ExitStack() as stack:

        def patch(owner: Any, **values: Any) -> None:
            for name, value in values.items():
                stack.enter_context(mock.patch.object(owner, name, value, create=True))

        if args.transformer_impl != "local":
            patch(DotProductAttention, forward=_attend)
            patch(LocalAttention, forward=_attend)
        patch(torch.nn.functional, rms_norm=lambda x, shape, weight=None, eps=None: _normed(x, weight, None))
        patch(
            torch.nn.functional,
            layer_norm=lambda x, shape, weight=None, bias=None, eps=1e-5: _normed(x, weight, bias),
        )
        if args.norm_backend != "torch":
            patch(backends, backend_for=lambda _: _KERNELS)
        if args.apply_rope_fusion:
            patch(rope_utils, _apply_rotary_pos_emb_bshd=_rotate)
        patch(fused_bias_swiglu, swiglu=_half, bias_swiglu=_half, weighted_swiglu=_half)
        patch(
            fused_bias_swiglu,
            swiglu_back=lambda g, y: torch.empty_like(y),
            bias_swiglu_back=lambda g, y, bias: torch.empty_like(y),
            weighted_swiglu_back=_weighted_back,
        )
        patch(
            fused_cross_entropy,
            calculate_logits_max=_logits_max,
            calculate_predicted_logits=_predicted,
            calculate_cross_entropy_loss=_loss,
            calculate_gradients=_logits_gradient,
        )
        _DUMMIES.made.clear()
        patch(layers, HAVE_TE=True, get_dummy_wgrad=_DUMMIES.get, fused_weight_gradient_mlp_cuda=_NoGemms)
        patch(layers, _grad_accum_fusion_available=True)
        patch(layers, LinearWithGradAccumulationAndAsyncCommunication=_Linears)
        yield
