"""What is changed in single layers of a built model: attributes of the objects, not of their classes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from megatron_periln.patches.registry import changes

__all__ = [
    "gather_before_graphs",
    "keep_grad_mode_of_caller",
    "replace_bda",
    "without_graphs",
    "wrap_embedding_reads",
]

_LAYER = "megatron.core.transformer.transformer_layer.TransformerLayer"
_MTP_LAYER = "megatron.core.transformer.multi_token_prediction.MultiTokenPredictionLayer"


@changes(
    f"{_LAYER}.bias_dropout_add_exec_handler",
    why="a layer calls its bias-dropout-adds under `torch.enable_grad`. With parameters in them that "
    "would keep every layer's activations alive in evaluation, and inside full recomputation",
    until="patches/test_transformer_layers.py::test_upstream_still_enables_grad_for_bias_dropout_add",
)
def keep_grad_mode_of_caller(layer: Any) -> None:
    """Let a layer's bias-dropout-adds see the caller's grad mode."""
    layer.bias_dropout_add_exec_handler = contextlib.nullcontext


@changes(
    f"{_LAYER}._get_submodules_under_cudagraphs",
    why="a layer lists the modules whose parameters are gathered before Transformer Engine's CUDA "
    "graphs of its parts are replayed (`--overlap-param-gather`). The bias-dropout-adds are in the "
    "graphs, and not on its list: they have no parameters in stock Megatron",
    until="patches/test_transformer_layers.py::test_upstream_still_lists_no_bias_dropout_add_under_cuda_graphs",
)
def gather_before_graphs(layer: Any, modules: Sequence[nn.Module]) -> None:
    """Have ``modules`` of a layer counted among what its CUDA graphs hold."""
    listed = layer._get_submodules_under_cudagraphs
    layer._get_submodules_under_cudagraphs = functools.partial(_also, listed, modules)


def _also(listed: Callable[[], list[nn.Module]], modules: Sequence[nn.Module]) -> list[nn.Module]:
    return [*listed(), *modules]


@changes(
    f"{_LAYER}.self_attn_bda",
    f"{_LAYER}.mlp_bda",
    why="stock Megatron's bias-dropout-add is a function, on which the monitor can hang no hook",
    until="patches/test_transformer_layers.py::test_upstream_still_has_a_function_for_bias_dropout_add",
)
def replace_bda(layer: Any, name: str, bda: Callable[..., Any]) -> Callable[[], None]:
    """Put ``bda`` in the place of a layer's bias-dropout-add called ``name``; return what undoes it."""
    original = getattr(layer, name)
    setattr(layer, name, bda)
    return functools.partial(setattr, layer, name, original)


@changes(
    f"{_LAYER}.cudagraph_manager",
    f"{_LAYER}.cuda_graphs",
    why="a layer that has CUDA graphs replays them: no Python runs, hooks neither. A step whose layers the "
    "monitor sees runs without them",
    until="patches/test_transformer_layers.py::test_upstream_still_replays_the_graphs_of_every_step",
)
@contextlib.contextmanager
def without_graphs(chunks: Sequence[nn.Module]) -> Iterator[None]:
    """Run the layers of model chunks without their CUDA graphs, for as long as the context lasts.

    Those of a whole iteration, and of parts of mixtures of experts with Megatron's own graphs, are elsewhere.
    """
    with contextlib.ExitStack() as stack:
        for module in [module for chunk in chunks for module in chunk.modules()]:
            if (manager := module._modules.pop("cudagraph_manager", None)) is not None:
                stack.callback(setattr, module, "cudagraph_manager", manager)
            if graphs := getattr(module, "cuda_graphs", None):
                module.cuda_graphs = []  # type: ignore[assignment]
                stack.callback(setattr, module, "cuda_graphs", graphs)
        yield


@changes(
    f"{_MTP_LAYER}._get_embeddings",
    f"{_MTP_LAYER}.forward_single_position",
    why="a layer of multi-token prediction reads the model's embedding, on whichever pipeline stage it "
    "runs, and is to read it without the embedding norm, whose parameters are on the first stage "
    "only",
    until="patches/test_transformer_layers.py::test_upstream_still_reads_the_embedding_in_two_places",
)
def wrap_embedding_reads(layer: Any, wrapper: Callable[..., Any]) -> None:
    """Call ``wrapper(method, ...)`` instead of the two methods in which an MTP layer reads the embedding."""
    for name in ("_get_embeddings", "forward_single_position"):
        setattr(layer, name, functools.partial(wrapper, getattr(layer, name)))
