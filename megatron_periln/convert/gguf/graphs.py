"""Which targets llama.cpp computes, and what of them its graphs or its converter leave out without a word.

Source: ``conversion/`` and ``src/models/`` of llama.cpp (that of llama-cpp-python 0.3.36). The logits of a
small model are compared in llama.cpp for each of the targets, tests/convert/test_llama_cpp.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_periln.convert.model_folder import check_model_folder
from megatron_periln.convert.targets import TARGETS
from megatron_periln.errors import UsageError, with_kind

__all__ = ["check_graph", "window_of"]

Windows = Callable[[list[bool]], str | None]


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
    windows
        Returns what is not as it has it, of which layers have a window. None if its layers have none.
    """

    llama3: bool = False
    whole_heads: bool = False
    every_layer: bool = False
    normalized: bool | None = None
    windows: Windows | None = None


def _by_64_layers(windowed: list[bool]) -> str | None:
    if any(windowed) == (len(windowed) == 64):
        return None
    has = "windows" if any(windowed) else "no windows"
    return f"an EXAONE-4 to have windows if it has 64 layers, and else none; it has {len(windowed)} and {has}"


def _by_four(windowed: list[bool]) -> str | None:
    if all(each == bool((layer + 1) % 4) for layer, each in enumerate(windowed)):
        return None
    return (
        "every fourth layer of an AFMoE, and no other, to be without a window and positions (train with "
        "--window-size and --window-attn-skip-freq 4)"
    )


_GRAPHS = {
    "glm4": _Graph(),
    "llama": _Graph(llama3=True),
    "qwen3": _Graph(),
    "exaone4": _Graph(llama3=True, whole_heads=True, windows=_by_64_layers),
    "olmo2": _Graph(whole_heads=True),
    "olmo3": _Graph(whole_heads=True, windows=lambda windowed: None),
    "mixtral": _Graph(llama3=True),
    "qwen2_moe": _Graph(whole_heads=True, every_layer=True, normalized=False),
    "qwen3_moe": _Graph(every_layer=True, normalized=True),
    "glm4_moe": _Graph(),
    "afmoe": _Graph(windows=_by_four),
}


def check_graph(model: Path) -> Any:
    """Return a model's configuration, if llama.cpp has a graph that computes the same.

    Raises
    ------
    UsageError
        With the architecture, or the setting and what llama.cpp takes it to be.
    """
    check_model_folder(model)
    (architecture,) = json.loads((model / "config.json").read_text()).get("architectures") or [None]
    known = {TARGETS[name].architecture: name for name in _GRAPHS}
    if architecture not in known:
        raise UsageError(
            f"llama.cpp is not known to compute {architecture} as transformers does; it has those of "
            f"export-hf --target {', '.join(known.values())}"
        )
    from transformers import AutoConfig  # not above: what was refused needs none of its seconds

    try:
        config = AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each architecture's own code, which fails in its own ways
        raise UsageError(f"transformers can't read {model}/config.json: {with_kind(error, 300)}") from error
    for taken in _otherwise(_GRAPHS[known[architecture]], config):
        raise UsageError(f"{model}/config.json: llama.cpp takes {taken}")
    return config


def window_of(config: Any) -> int | None:
    """Return how many tokens a layer with a window sees, None if no layer of a model has one."""
    return config.sliding_window if any(_windowed(config)) else None


def _otherwise(graph: _Graph, config: Any) -> Iterator[str]:
    """Yield what llama.cpp takes for granted, and is otherwise."""
    heads, size = config.num_attention_heads, config.hidden_size
    width = getattr(config, "head_dim", None) or size // heads
    if graph.whole_heads and heads * width != size:
        yield f"heads to be of the hidden size together; it has {heads} of {width}, and a size of {size}"
    windowed = _windowed(config)
    if graph.windows is not None:
        if (taken := graph.windows(windowed)) is not None:
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
    """Yield what of the scaling of rotary frequencies would be dropped."""
    nested = config.rope_parameters
    scaling = nested.get("full_attention", nested)
    kind = scaling.get("rope_type", "default")
    if kind == "default":
        return
    if kind not in ("linear", "yarn") and not (kind == "llama3" and graph.llama3):
        yield f"rotary frequencies of this architecture to have no scaling by {kind}"
    elif kind == "yarn" and not scaling.get("truncate", True):
        yield "the bounds of yarn to be whole numbers; it has truncate false"
    elif windows and scaling is not nested:
        yield f"rotary frequencies to be scaled in layers without a window alone; they are by {kind} in all"


def _windowed(config: Any) -> list[bool]:
    """Return which layers have a window."""
    count = config.num_hidden_layers
    if not getattr(config, "sliding_window", None):
        return [False] * count
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * count
    return [kind == "sliding_attention" for kind in kinds]
