"""``torch.compile`` of `reference`: one graph for what recomputation computes twice.

torch.compile makes one graph of a function for training and another for calls under no_grad, and gives up on
a function that has too many. The graphs round differently, and what it gave up on draws dropout's numbers in
another way. Recomputation's first pass is under no_grad and its second is not: so it would differentiate
something that it had not computed, with another dropout mask in the worst case. Megatron's own compiled
bias-dropout-add runs under enable_grad in both (``bias_dropout_add_exec_handler``); but it would keep the
graph of whatever it is given. Here it ends with the call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["compile_for_both_passes"]


def compile_for_both_passes[**P, R](
    specification: Callable[P, R], backend: str = "inductor"
) -> Callable[P, R]:
    """Return ``specification``, a function of tensors and settings by position, compiled.

    Whether gradients are wanted or not, it runs as the graph that training takes: of activations that all
    require gradients. Where none are recorded, its results don't keep that graph.

    Parameters
    ----------
    specification
        Takes parameters, which are left as they are, and activations, which are any other tensors.
    backend
        One of torch.compile's.
    """
    compiled = torch.compile(specification, backend=backend)

    @functools.wraps(specification)
    def compute(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.is_inference_mode_enabled():  # where nothing is ever differentiated
            return compiled(*args, **kwargs)
        recording = torch.is_grad_enabled()
        with torch.enable_grad():
            out = compiled(*map(_with_gradient, args), **kwargs)  # type: ignore[arg-type]
        return out if recording else _without_graph(out)

    return compute


def _with_gradient(argument: object) -> object:
    """Return an activation as one that requires a gradient: torch.compile has a graph for either."""
    if not isinstance(argument, Tensor) or isinstance(argument, torch.nn.Parameter) or argument.requires_grad:
        return argument
    return argument.detach().requires_grad_()


def _without_graph(out: Any) -> Any:
    return out.detach() if isinstance(out, Tensor) else tuple(tensor.detach() for tensor in out)
