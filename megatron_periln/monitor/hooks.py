"""Hooks that see the residual stream and what the sublayers add to it.

They stand on Megatron's own modules: the decoder's input, its layers, the layers' bias-dropout-adds
and the final norm. None of them changes a value or draws a random number.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityFuncOp
from torch import Tensor, nn

from megatron_periln.monitor.layer_sums import (
    FP16_HALF,
    Sums,
    angular_distance,
    per_token,
    square_and_variance,
)
from megatron_periln.monitor.statistics import STREAM_MAX_ABS, SUBLAYERS
from megatron_periln.norms import NoNorm, NormedBiasDropoutAdd, OutputNorm, PlainAdd, PostNorm
from megatron_periln.norms.kernels.reference import gpas_part
from megatron_periln.patches.transformer_layers import replace_bda, without_graphs

__all__ = ["recomputing", "watched"]

# A Mamba layer's mixer is counted as attention is: it stands in its place.
_BDAS = {"attention": ("self_attn_bda", "mamba_bda"), "mlp": ("mlp_bda",)}


@contextmanager
def watched(chunks: Sequence[nn.Module], sums: Sums, layers: Collection[int]) -> Iterator[None]:
    """Add what passes through ``layers`` to ``sums``, for as long as the context lasts.

    Layers in CUDA graphs run without them meanwhile.

    Parameters
    ----------
    chunks
        The model chunks of this rank, unwrapped: ``GPTModel`` or ``HybridModel``. Their multi-token
        prediction layers are not watched.
    sums
        Receives the sums of this rank's tokens.
    layers
        Global layer numbers; those that other ranks hold are ignored.
    """
    with ExitStack() as stack:
        stack.enter_context(without_graphs(chunks))
        for chunk in chunks:
            decoder: Any = chunk.decoder
            if decoder.pre_process and 0 in layers:
                # The embedding itself is also called by multi-token prediction.
                hook = partial(_see_input, sums)
                stack.callback(decoder.register_forward_pre_hook(hook, with_kwargs=True).remove)
            for layer in decoder.layers:
                if layer.layer_number in layers:
                    hook = partial(_see_layer, sums, layer.layer_number)
                    stack.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
                    for sublayer, names in _BDAS.items():
                        for name in names:
                            stack.callback(_watch_bda(layer, name, sublayer, sums))
            final = getattr(decoder, "final_layernorm", None) or getattr(decoder, "final_norm", None)
            last = sums.rest - 1
            if final is not None and not isinstance(final, NoNorm) and last in layers:
                stack.callback(final.register_forward_hook(partial(_see_final_norm, sums, last)).remove)
        yield


def recomputing() -> bool:
    """Tell whether this forward pass runs inside a backward pass, its numbers seen before."""
    return torch._C._current_graph_task_id() != -1


def _see_input(sums: Sums, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _see_stream(sums, 0, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])


def _see_final_norm(sums: Sums, row: int, _: nn.Module, __: Any, output: Tensor) -> None:
    _see_stream(sums, row, output)


def _see_layer(
    sums: Sums, row: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    before = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    after = output[0] if isinstance(output, tuple) else output
    _see_stream(sums, row, after)
    if not recomputing():
        with torch.no_grad():
            sums.add("angle", row, per_token([angular_distance(before.float(), after.float())]))


def _see_stream(sums: Sums, row: int, stream: Tensor) -> None:
    if stream.requires_grad:  # with full recomputation only the second pass builds a graph
        stream.register_hook(partial(_see_gradient, sums, row))
    if recomputing():
        return
    with torch.no_grad():
        x = stream.float()
        size = x.abs()
        sums.add("stream", row, per_token([*square_and_variance(x), (size > FP16_HALF).float().mean(-1)]))
        sums.include(STREAM_MAX_ABS, row, size.amax())


@torch.no_grad()
def _see_gradient(sums: Sums, row: int, gradient: Tensor) -> None:
    square = gradient.float().square().sum(dtype=torch.float64)
    sums.add("stream_gradient", row, torch.stack([torch.ones_like(square), square]))


def _watch_bda(layer: Any, name: str, sublayer: str, sums: Sums) -> Callable[[], object]:
    """See every sublayer output that reaches a bias-dropout-add; return what ends it."""
    bda: Any = getattr(layer, name, None)
    if bda is None or isinstance(bda, IdentityFuncOp):
        return lambda: None
    see = partial(_see_output, sums, sublayer, layer.layer_number)
    if isinstance(bda, NormedBiasDropoutAdd):
        # Runs after Megatron's own hooks, which gather the norm's parameters.
        return bda.norm.register_forward_pre_hook(partial(_before_norm, see)).remove
    # A function of Megatron's, for which there are no hooks.
    return replace_bda(layer, name, lambda training, fused: partial(_seen_add, see, bda(training, fused)))


def _before_norm(see: Callable[..., None], norm: nn.Module, args: tuple[Any, ...]) -> None:
    sublayer_output, sublayer_bias, residual, *_dropout = args
    if not recomputing():
        see(norm, sublayer_output, sublayer_bias, residual)


def _seen_add(
    see: Callable[..., None],
    add: Callable[..., Tensor],
    output_with_bias: tuple[Tensor, Tensor | None],
    residual: Tensor,
    dropout: float,
) -> Tensor:
    if not recomputing():
        see(None, *output_with_bias, residual)
    return add(output_with_bias, residual, dropout)


@torch.no_grad()
def _see_output(
    sums: Sums,
    sublayer: str,
    row: int,
    norm: OutputNorm | PostNorm | PlainAdd | None,
    output: Tensor,
    bias: Tensor | None,
    residual: Tensor,
) -> None:
    x = output.float() if bias is None else output.float() + bias.float()
    added, stream = x, residual.float()
    if isinstance(norm, OutputNorm):
        added = norm.normalize(x, x.dtype)
    if norm is not None and (norm.scales or norm.gate is not None):
        of_stream, of_output = (torch.as_tensor(scale).to(stream) for scale in norm.scales or (1, 1))
        if norm.gate is not None:
            left = 1 - gpas_part(norm.gate.float())
            of_stream, of_output = of_stream * left, of_output * left
        added, stream = of_output * added, of_stream * stream
        means = of_stream.mean(), of_output.mean()
        sums.add(f"{sublayer}_scales", row, torch.stack([torch.ones_like(means[0]), *means]))
    before = square_and_variance(x)
    after = before if added is x else square_and_variance(added)
    sums.add(sublayer, row, per_token([*before, *after, stream.square().mean(-1)]))
    if isinstance(norm, OutputNorm | PostNorm):
        weight = norm.weight.float() + norm.zero_centered_gamma
        sums.add(f"{sublayer}_weight", row, torch.stack([torch.ones_like(weight), weight]).sum(1))
        sums.include(SUBLAYERS[sublayer].gain_max, row, weight.amax())
        sums.include(SUBLAYERS[sublayer].gain_min, row, weight.amin())
