"""Which pipeline stages have the same model: a job has no more kinds of ranks than it has of stages."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

__all__ = ["first_rank", "layers_of", "likeness", "name_of"]

# By which layers differ from each other: a list over the layers, or every which layer is another.
_PATTERNS = ("moe_layer_freq", "window_attn_skip_freq", "no_rope_freq", "linear_attention_freq")


def name_of(stage: int, stages: int) -> str:
    """Return what a pipeline stage is called."""
    if stages == 1:
        return "every rank"
    return {0: "first stage", stages - 1: "last stage"}.get(stage, f"stage {stage + 1}")


def first_rank(args: Namespace, stage: int) -> int:
    """Return the first rank of a pipeline stage, in Megatron's order of ranks."""
    if args.use_tp_pp_dp_mapping:
        return int(stage * args.tensor_model_parallel_size * args.context_parallel_size)
    return int(stage * (args.world_size // args.pipeline_model_parallel_size))


def layers_of(args: Namespace, config: TransformerConfig, stage: int) -> tuple[range, ...]:
    """Return the decoder's layers, from 0, that each virtual stage of a pipeline stage has."""
    if layout := getattr(config, "pipeline_model_parallel_layout", None):
        return _of_layout(layout.layout, stage)
    virtual = args.virtual_pipeline_model_parallel_size
    parts = []
    for chunk in range(virtual or 1):
        vp_stage = chunk if virtual else None
        first = get_transformer_layer_offset(config, vp_stage, stage)
        parts.append(range(first, first + get_num_layers_to_build(config, vp_stage, stage)))
    return tuple(parts)


def _of_layout(layout: Sequence[Sequence[Sequence[LayerType]]], stage: int) -> tuple[range, ...]:
    """Return the same of ``--pipeline-model-parallel-layout``, ``[stage][virtual stage]``.

    Megatron's functions for it take the stage from the process that asks, whichever they are asked for.
    """
    counts = [[part.count(LayerType.decoder) for part in parts] for parts in layout]
    ranges = []
    for chunk, count in enumerate(counts[stage]):
        earlier = sum(each for parts in counts for each in parts[:chunk])
        first = earlier + sum(parts[chunk] for parts in counts[:stage])
        ranges.append(range(first, first + count))
    return tuple(ranges)


def _kind(args: Namespace, layer: int) -> tuple[Any, ...]:
    kinds: list[Any] = []
    for name in _PATTERNS:
        pattern = getattr(args, name, None)
        if isinstance(pattern, list | tuple):
            kinds.append(pattern[layer])
        else:
            kinds.append(layer % pattern if isinstance(pattern, int) and pattern > 0 else None)
    return tuple(kinds)


def likeness(args: Namespace, config: TransformerConfig, stage: int) -> tuple[Any, ...]:
    """Return what is equal for pipeline stages whose model is the same but for the numbers in it."""
    last = args.pipeline_model_parallel_size - 1
    if args.hybrid_layer_pattern or config.heterogeneous_block_specs or 0 in (stage, last - stage):
        return (stage,)
    layout = getattr(config, "pipeline_model_parallel_layout", None)
    given = str(layout.layout[stage]) if layout is not None else None
    layers = layers_of(args, config, stage)
    ends = _bf16_ends(args) if args.fp8 else (0, 0)
    return (
        given,
        tuple(
            tuple(
                (
                    _kind(args, layer),
                    layer < ends[0],
                    layer >= args.num_layers - ends[1],
                )
                for layer in part
            )
            for part in layers
        ),
    )


def _bf16_ends(args: Namespace) -> tuple[int, int]:
    if not args.first_last_layers_bf16:
        return 0, 0
    return args.num_layers_at_start_in_bf16, args.num_layers_at_end_in_bf16
