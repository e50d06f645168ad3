"""The output norm as one Triton kernel forward and one backward, with the bias, dropout and residual add.

And with the next norm, if asked for. `fused_rows` has the mathematics, `plans` how the kernels are launched.

Kept for the backward pass: the sublayer output, the parameters, one or two numbers a row and the seed of
dropout; no normed or dropped copy. For learned scales the residual stream too, which the input norm before
it keeps anyway. Parameter gradients are summed in a fixed order, without atomics, so that the same step gives
the same bits.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_periln.norms.kernels.fused_rows import norm_add_forward
from megatron_periln.norms.kernels.launch_config import (
    MAX_NORM_ADD_HIDDEN_SIZE,
    MAX_NORM_ADD_NORM_HIDDEN_SIZE,
    choose_launch_config,
)
from megatron_periln.norms.kernels.plans import Options, Others, Plan, Saved
from megatron_periln.norms.kernels.reference import Scale

__all__ = ["INTERPRETED", "multiprocessors", "norm_add", "norm_add_norm"]

# Whether TRITON_INTERPRET=1 was set when the kernels were imported: they run on the CPU, slowly.
INTERPRETED = not isinstance(norm_add_forward, triton.JITFunction)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a GPU has; 2 for the interpreter, so that sums have parts there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


_plans: dict[Any, Plan] = {}
_MOST_PLANS = 1024  # shapes that never come again are forgotten
_NO_OTHERS: Others = (None, None, None, None)


def _plan_for(
    sublayer_output: Tensor, residual: Tensor, weight: Tensor, others: Others, options: tuple[Any, ...]
) -> Plan:
    """Return the plan for calls like this one; ``options`` are `Options`, not yet named."""
    sublayer_bias, bias, next_weight, next_bias, *scales = others
    shape = sublayer_output.shape
    plain = sublayer_bias is None and bias is None and options[2] == 0 and not scales
    config = choose_launch_config(shape[-1], plain, next_weight is not None)
    key = (
        shape,
        residual.shape,
        sublayer_output.dtype,
        residual.dtype,
        weight.dtype,
        None if sublayer_bias is None else sublayer_bias.dtype,
        bias is None,
        None if next_weight is None else next_weight.dtype,
        next_bias is None,
        *[None if scale is None else (scale.shape, scale.dtype) for scale in scales],
        options,
        config,
        sublayer_output.get_device(),
        residual.get_device(),
        weight.get_device(),
        multiprocessors,
    )
    if (plan := _plans.get(key)) is None:
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        on_gpu = multiprocessors(sublayer_output.device)
        plan = Plan(sublayer_output, residual, weight, others, Options(*options), config, on_gpu)
        _plans[key] = plan
    return plan


# --- The autograd function.


class _NormAdd(torch.autograd.Function):
    """From `INPUTS` to the sum, and with the next norm to that of it too.

    Every input, also one that is None, costs the host time: ``others`` are left out where there are none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        sublayer_output: Tensor,
        residual: Tensor,
        weight: Tensor,
        *others: Tensor | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        sublayer_bias, bias, next_weight, next_bias, *scales = others or _NO_OTHERS
        out = torch.empty_like(residual, memory_format=torch.contiguous_format)
        statistics = residual.new_empty(plan.statistics_size, dtype=plan.compute_dtype)
        seed = normed = None
        if plan.options.dropout > 0:
            seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=residual.device)
        if next_weight is not None:
            normed = torch.empty_like(out, dtype=plan.options.next_dtype)
        kept_out = None if normed is None else out
        saved = Saved(sublayer_output, weight, statistics, sublayer_bias, seed, kept_out, next_weight)
        if scales:
            needed = any(ctx.needs_input_grad[-2:])
            saved = Saved(*saved[:7], bias if needed else None, residual if needed else None, *scales)
        n_kept = len(saved) if scales else 7 if others or seed is not None else 3
        ctx.save_for_backward(*saved[:n_kept])
        ctx.plan = plan
        if plan.n_rows:
            plan.forward(residual, bias, next_bias, saved, out, normed)
        return out if normed is None else (out, normed)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_normed: Tensor | None = None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # with create_graph; the decorator costs as much as a launch
            return _backward_once(ctx, grad_out, grad_normed)
        return _backward(ctx, grad_out, grad_normed)


def _backward(ctx: Any, grad_out: Tensor, grad_normed: Tensor | None) -> tuple[Tensor | None, ...]:
    needed, saved = ctx.needs_input_grad, Saved(*ctx.saved_tensors)
    learned = ctx.plan.scale_size
    if grad_normed is None and not learned and not needed[1] and not any(needed[3:]):  # the residual's alone
        scale = ctx.plan.options.residual_scale
        return None, None, grad_out if scale is None else scale * grad_out, *(None for _ in needed[3:])
    return tuple(ctx.plan.backward(needed).gradients(saved, grad_out, grad_normed))


_backward_once = once_differentiable(_backward)


# --- The functions.


def _scales(
    residual_scale: Scale, output_scale: Scale
) -> tuple[tuple[float | None, ...], tuple[Tensor | None, ...]]:
    """Return constant scales, then learned ones, as the kernels take them: for 1 they have no operation.

    Raises
    ------
    ValueError
        If one is learned and the other is not.
    """
    scales = (residual_scale, output_scale)
    learned = tuple(scale for scale in scales if isinstance(scale, Tensor))
    if len(learned) == 1:
        raise ValueError("the Triton kernels take two scales that are constants, or two that are learned")
    return tuple(None if learned or scale == 1.0 else float(scale) for scale in scales), learned


def _is_learned(*scales: Scale) -> bool:
    """Tell whether one is a tensor, which no comparison may have the host wait for."""
    return any(isinstance(scale, Tensor) for scale in scales)


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
    """`megatron_periln.norms.kernels.reference.norm_add`, fused.

    Dropout draws one number from the device's generator, which seeds all of a call's elements:
    where Megatron restores the generator, as in recomputation, the same elements are dropped, and
    ranks that share the generator's state drop the same ones.

    Raises
    ------
    ValueError
        If a row is longer than `MAX_NORM_ADD_HIDDEN_SIZE`, or one scale is learned and the other is not.
    """
    hidden_size = sublayer_output.shape[-1]
    if hidden_size > MAX_NORM_ADD_HIDDEN_SIZE:
        raise ValueError(
            f"the Triton kernels take a hidden size of {MAX_NORM_ADD_HIDDEN_SIZE} at most, not {hidden_size}"
        )
    options: tuple[Any, ...] = (eps, float(zero_centered_gamma), dropout if training else 0.0)
    others: Others = (sublayer_bias, bias, None, None)
    learned: Others = ()
    if _is_learned(residual_scale, output_scale) or residual_scale != 1.0 or output_scale != 1.0:
        constants, learned = _scales(residual_scale, output_scale)
        options, others = (*options, None, None, *constants), (*others, *learned)
    plan = _plan_for(sublayer_output, residual, weight, others, options)
    if sublayer_bias is None and bias is None and not learned:
        return _NormAdd.apply(plan, sublayer_output, residual, weight)
    return _NormAdd.apply(plan, sublayer_output, residual, weight, *others)


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
    """`megatron_periln.norms.kernels.reference.norm_add_norm`, fused; dropout as in `norm_add`.

    Raises
    ------
    ValueError
        If a row is longer than `MAX_NORM_ADD_NORM_HIDDEN_SIZE`, or a scale is learned: of the longest rows
        registers would not hold the sums for it.
    """
    hidden_size = sublayer_output.shape[-1]
    if hidden_size > MAX_NORM_ADD_NORM_HIDDEN_SIZE:
        raise ValueError(
            "the Triton kernels with the next norm take a hidden size of "
            f"{MAX_NORM_ADD_NORM_HIDDEN_SIZE} at most, not {hidden_size}"
        )
    dropout = dropout if training else 0.0
    constants, learned = _scales(residual_scale, output_scale)
    if learned:
        raise ValueError("the Triton kernels with the next norm take scales that are constants")
    options = (eps, float(zero_centered_gamma), dropout, next_eps, next_dtype, *constants)
    others = (sublayer_bias, bias, next_weight, next_bias)
    plan = _plan_for(sublayer_output, residual, weight, others, options)
    return _NormAdd.apply(plan, sublayer_output, residual, weight, *others)
