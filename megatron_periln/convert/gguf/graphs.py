"""Which targets llama.cpp computes, and what of them its graphs or its converter leave out without a word.

Source: ``conversion/`` and ``src/models/`` of llama.cpp (that of llama-cpp-python 0.3.36). The logits of a
small model are compared in llama.cpp for each of the targets, tests/convert/test_llama_cpp.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any

from megatron_periln.convert.model_folder import check_model_folder, transformers_config
from megatron_periln.convert.rope_scaling import yarn_attention_factor
from megatron_periln.convert.targets import TARGETS
from megatron_periln.errors import UsageError

__all__ = ["check_graph", "window_of"]

Windows = Callable[[list[bool], Any], str | None]


class _Reads(Enum):
    """Which layers have a window in transformers where a configuration has ``sliding_window``."""

    NONE = auto()
    ALL = auto()
    LAYER_TYPES = auto()


@dataclass(frozen=True, kw_only=True)
class _Graph:
    """What llama.cpp computes of an architecture, where it is less than transformers does.

    Parameters
    ----------
    llama3
        The converter writes Llama 3's scaling of the rotary frequencies.
    whole_heads
        It takes the heads to be of the hidden size together.
    every_layer
        It has experts in each layer.
    normalized
        Whether the chosen experts' scores add up to 1, where that is not a setting.
    window
        What the class in transformers reads of windows.
    windows
        Returns what is not as it has it, of which layers have a window, and the configuration. None if its
        layers have none.
    """

    llama3: bool = False
    whole_heads: bool = False
    every_layer: bool = False
    normalized: bool | None = None
    window: _Reads = _Reads.LAYER_TYPES
    windows: Windows | None = None


def _by_64_layers(windowed: list[bool], config: Any) -> str | None:
    if any(windowed) == (len(windowed) == 64):
        if any(windowed) or config.sliding_window is None:
            return None
        # Exaone4Attention has positions where sliding_window is null, or a layer has a window.
        return (
            "an EXAONE-4 without windows to have positions in all layers, and in transformers it has them in "
            f"none, because sliding_window is {config.sliding_window}; if it was trained with positions, set "
            "it to null"
        )
    has = "windows" if any(windowed) else "no windows"
    return f"an EXAONE-4 to have windows if it has 64 layers, and else none; it has {len(windowed)} and {has}"


def _by_four(windowed: list[bool], config: Any) -> str | None:
    if all(each == bool((layer + 1) % 4) for layer, each in enumerate(windowed)):
        return None
    return (
        "every fourth layer of an AFMoE, and no other, to be without a window and positions (train with "
        "--window-size and --window-attn-skip-freq 4)"
    )


def _without(windowed: list[bool], config: Any) -> str | None:
    if not hasattr(config, "sliding_window"):
        return None
    return (
        "an OLMo-2 with sliding_window to have windows, and in transformers it has none; take sliding_window "
        f"({config.sliding_window}) out"
    )


_GRAPHS = {
    "glm4": _Graph(window=_Reads.NONE),
    "llama": _Graph(llama3=True, window=_Reads.NONE),
    "qwen3": _Graph(),
    "exaone4": _Graph(llama3=True, whole_heads=True, windows=_by_64_layers),
    "olmo2": _Graph(whole_heads=True, window=_Reads.NONE, windows=_without),
    "olmo3": _Graph(whole_heads=True, windows=lambda windowed, config: None),
    "mixtral": _Graph(llama3=True, window=_Reads.ALL),
    "qwen2_moe": _Graph(whole_heads=True, every_layer=True, normalized=False),
    "qwen3_moe": _Graph(every_layer=True, normalized=True, window=_Reads.ALL),
    "glm4_moe": _Graph(window=_Reads.NONE),
    "afmoe": _Graph(windows=_by_four),
}
_BY_ARCHITECTURE = {TARGETS[name].architecture: graph for name, graph in _GRAPHS.items()}


def check_graph(model: Path) -> Any:
    """Return a model's configuration, if llama.cpp has a graph that computes the same.

    Raises
    ------
    UsageError
        With the architecture, or the setting and what llama.cpp takes it to be.
    """
    check_model_folder(model)
    named = json.loads((model / "config.json").read_text()).get("architectures")
    # llama.cpp takes the first.
    architecture = named[0] if isinstance(named, list) and named else named
    if not (isinstance(architecture, str) and architecture in _BY_ARCHITECTURE):
        raise UsageError(
            f"llama.cpp is not known to compute {architecture} as transformers does; it has those of "
            f"export-hf --target {', '.join(_GRAPHS)}"
        )
    config = transformers_config(model)
    for taken in _otherwise(_BY_ARCHITECTURE[architecture], config):
        raise UsageError(f"{model}/config.json: llama.cpp takes {taken}")
    return config


def window_of(config: Any) -> int | None:
    """Return how many tokens a layer with a window sees, None if no layer of a model has one."""
    windowed = _windowed(_BY_ARCHITECTURE[config.architectures[0]], config)
    return config.sliding_window if any(windowed) else None


def _otherwise(graph: _Graph, config: Any) -> Iterator[str]:
    """Yield what llama.cpp takes for granted, and is otherwise."""
    heads, size = config.num_attention_heads, config.hidden_size
    width = getattr(config, "head_dim", None) or size // heads
    if graph.whole_heads and heads * width != size:
        yield f"heads to be of the hidden size together; it has {heads} of {width}, and a size of {size}"
    windowed = _windowed(graph, config)
    if graph.windows is not None:
        if (taken := graph.windows(windowed, config)) is not None:
            yield taken
    elif any(windowed):
        yield f"all layers to see all tokens before; it has sliding_window {config.sliding_window}"
    yield from _rotation(graph, config, any(windowed))
    if graph.every_layer and (config.mlp_only_layers or config.decoder_sparse_step != 1):
        yield (
            f"every layer to have experts; it has mlp_only_layers {config.mlp_only_layers} and "
            f"decoder_sparse_step {config.decoder_sparse_step}"
        )
    if graph.normalized is not None and config.norm_topk_prob is not graph.normalized:
        yield (
            f"norm_topk_prob to be {graph.normalized} (train {'without' if graph.normalized else 'with'} "
            f"--moe-router-pre-softmax); it is {config.norm_topk_prob}"
        )


def _rotation(graph: _Graph, config: Any, windows: bool) -> Iterator[str]:
    """Yield what of the rotary frequencies and their scaling would be dropped."""
    nested = config.rope_parameters
    scaling = nested.get("full_attention", nested)
    kind = scaling.get("rope_type", "default")
    if kind not in ("default", "linear", "yarn") and not (kind == "llama3" and graph.llama3):
        yield f"rotary frequencies of this architecture to have no scaling by {kind}"
    elif kind == "yarn":
        yield from _yarn(scaling)
    if windows and scaling is not nested:
        yield from _rotation_of_windows(nested["sliding_attention"], scaling)


def _yarn(scaling: Mapping[str, Any]) -> Iterator[str]:
    """Yield what of YaRN these graphs don't read, and take to be as it is by default."""
    if not scaling.get("truncate", True):
        yield "the bounds of yarn to be whole numbers; it has truncate false"
    for name, default in (("beta_fast", 32), ("beta_slow", 1)):
        if (value := scaling.get(name) or default) != default:  # transformers takes 0 for the default too
            yield f"{name} of yarn to be {default}; it is {value}"
    for name in ("mscale", "mscale_all_dim"):
        if (value := scaling.get(name)) is not None:
            yield f"yarn to have no {name}; it is {value}"
    if (factor := scaling.get("factor")) is None:
        yield "yarn to have a factor; it has none"
        return
    own = yarn_attention_factor(factor)
    value = scaling.get("attention_factor")
    if value is not None and not math.isclose(value, own, rel_tol=1e-6):
        yield f"attention_factor of yarn to be 0.1 * ln(factor) + 1, {own:.6g}; it is {value}"


def _rotation_of_windows(own: Mapping[str, Any], full: Mapping[str, Any]) -> Iterator[str]:
    """Yield what would be dropped where layers with a window have rotary frequencies of their own."""
    if (kind := own.get("rope_type", "default")) != "default":
        yield f"rotary frequencies of layers with a window to have no scaling; they are scaled by {kind}"
    if own["rope_theta"] != full["rope_theta"]:
        yield (
            "layers with a window to have the rope_theta of those without; they have "
            f"{own['rope_theta']} and {full['rope_theta']}"
        )


def _windowed(graph: _Graph, config: Any) -> list[bool]:
    """Return which layers have a window in transformers."""
    count = config.num_hidden_layers
    if graph.window is _Reads.NONE or not config.sliding_window:
        return [False] * count
    if graph.window is _Reads.ALL:
        return [True] * count
    return [kind == "sliding_attention" for kind in config.layer_types]
