"""A model's weights, from Megatron's checkpoint to transformers' tensors and back.

From top to bottom: parameter mapping, the order of rows in attention's weights, weight folding, export,
import.

A parameter has a neutral name here, such as ``attention.q.weight``. The parameter mapping leads from it to
Megatron's name, `Target.tensor_name` to that in an architecture of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_periln.convert.architecture import Architecture
from megatron_periln.convert.experts.weights import (
    EXPERT_LAYER_NAMES,
    EXPERT_NAMES,
    absent_modules,
    exported_experts,
    fill_shared,
    fold_shared_switch,
)
from megatron_periln.convert.targets import Target

__all__ = [
    "VOCABULARY_TABLES",
    "exported_tensors",
    "imported_tensor",
    "interleave_rotary_pairs",
    "is_exported_tied",
    "join_qkv",
    "separate_rotary_pairs",
    "split_qkv",
    "without_scales",
]

# Parameter mapping

_GLOBAL_NAMES = {
    "embedding.weight": "embedding.word_embeddings.weight",
    "embedding_norm.weight": "embedding.norm.weight",
    "final_norm.weight": "decoder.final_layernorm.weight",
    "head.weight": "output_layer.weight",
}
"""From a parameter's neutral name to Megatron's in a checkpoint."""

VOCABULARY_TABLES = frozenset({_GLOBAL_NAMES["embedding.weight"], _GLOBAL_NAMES["head.weight"]})
"""Those with a row for each id, by Megatron's names."""

_LAYER_NAMES = {
    "attention.input_norm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "attention.qkv.weight": "self_attention.linear_qkv.weight",
    "attention.qkv.bias": "self_attention.linear_qkv.bias",
    "attention.q_norm.weight": "self_attention.q_layernorm.weight",
    "attention.k_norm.weight": "self_attention.k_layernorm.weight",
    "attention.proj.weight": "self_attention.linear_proj.weight",
    "attention.proj.bias": "self_attention.linear_proj.bias",
    "attention.output_norm.weight": "self_attn_bda.norm.weight",
    "mlp.input_norm.weight": "mlp.linear_fc1.layer_norm_weight",
    "mlp.gate_up.weight": "mlp.linear_fc1.weight",
    "mlp.gate_up.bias": "mlp.linear_fc1.bias",
    "mlp.down.weight": "mlp.linear_fc2.weight",
    "mlp.down.bias": "mlp.linear_fc2.bias",
    "mlp.output_norm.weight": "mlp_bda.norm.weight",
    **EXPERT_LAYER_NAMES,
}
"""The same within a layer. A norm in bias-dropout-add is an ``output_norm``, also Post-LN's."""

_NEUTRAL_NAMES = {name: parameter for parameter, name in _GLOBAL_NAMES.items()} | {
    f"decoder.layers.{name}": parameter for parameter, name in (_LAYER_NAMES | EXPERT_NAMES).items()
}
"""From the key of a tensor in Megatron's sharded state, without a layer's index, to the neutral name."""

_LAYER_INDEX = re.compile(r"(?<=^decoder\.layers\.)\d+\.")  # where layers differ

_KEPT_IN_FP32 = "mlp.expert_bias"
"""What is fp32 in every model: rounded, it would choose other experts."""

_BIAS_GROUPS = {"attention.qkv": "qkv", "attention.proj": "proj", "mlp.gate_up": "mlp", "mlp.down": "mlp"}


def _layer_parameters(architecture: Architecture, layer: int) -> list[str]:
    """Return the neutral names of what a layer has in Megatron, but for each expert's own."""
    placement = architecture.placement
    absent = absent_modules(architecture.experts, layer)
    if not placement.input:
        absent |= {"attention.input_norm", "mlp.input_norm"}
    if not (placement.output or placement.after_add):
        absent |= {"attention.output_norm", "mlp.output_norm"}
    if not architecture.qk_norm:
        absent |= {"attention.q_norm", "attention.k_norm"}
    return [
        name
        for name in _LAYER_NAMES
        if not any(f"{name}.".startswith(f"{module}.") for module in absent)
        and (not name.endswith(".bias") or _BIAS_GROUPS[name.removesuffix(".bias")] in architecture.biases)
    ]


# The order of rows in attention's weights


def qkv_parts(architecture: Architecture) -> tuple[str, ...]:
    """Return the neutral names of what Megatron's ``linear_qkv`` has, in its order."""
    return ("q", "gate", "k", "v") if architecture.attention_gate else ("q", "k", "v")


def split_qkv(fused: Tensor, architecture: Architecture) -> tuple[Tensor, ...]:
    """Split Megatron's ``linear_qkv`` into queries, keys and values, with a gate behind the queries.

    Parameters
    ----------
    fused
        The weight ``[(heads + 2 * kv_heads) * head_dim, hidden]``, or the bias without its last
        dimension: for each key-value head the queries it serves, their gates, its key, its value
        (megatron/core/transformer/attention.py).
    architecture
        Gives the numbers of heads.
    """
    kv_heads, head_dim = architecture.num_kv_heads, architecture.head_dim
    groups = fused.unflatten(0, (kv_heads, -1, head_dim))
    served = architecture.num_heads // kv_heads
    sizes = [1 if part in "kv" else served for part in qkv_parts(architecture)]
    return tuple(part.flatten(0, 2) for part in groups.split(sizes, dim=1))


def join_qkv(*parts: Tensor, architecture: Architecture) -> Tensor:
    """Undo `split_qkv`."""
    kv_heads, head_dim = architecture.num_kv_heads, architecture.head_dim
    groups = [part.unflatten(0, (kv_heads, -1, head_dim)) for part in parts]
    return torch.cat(groups, dim=1).flatten(0, 2)


def interleave_rotary_pairs(rows: Tensor, architecture: Architecture) -> Tensor:
    """Make neighbours of the rotary pairs, which are half the rotated channels apart.

    Parameters
    ----------
    rows
        ``[heads * head_dim, ...]``: of queries or keys the weight, the bias, or the weight of their norm.
    architecture
        Gives the head's size, and how many of its channels rotate.
    """
    return _transpose_rotated(rows, architecture, 2)


def separate_rotary_pairs(rows: Tensor, architecture: Architecture) -> Tensor:
    """Undo `interleave_rotary_pairs`."""
    return _transpose_rotated(rows, architecture, architecture.rotary_dim // 2)


def _transpose_rotated(rows: Tensor, architecture: Architecture, blocks: int) -> Tensor:
    """Transpose each head's rotated channels, seen as ``[blocks, channels // blocks]``."""
    heads = rows.unflatten(0, (-1, architecture.head_dim))
    rotated, rest = heads.tensor_split([architecture.rotary_dim], dim=1)
    rotated = rotated.unflatten(1, (blocks, -1)).transpose(1, 2).flatten(1, 2)
    return torch.cat([rotated, rest], dim=1).flatten(0, 1)


# Weight folding: what an exported model has no place for is multiplied into its weights, in fp32.
# `tensors` are those of one layer by neutral name, changed in place.

_ROWS = 1 << 14  # of a table that are converted to fp32 at a time

Read = Callable[..., Tensor]
"""``Checkpoint.read``."""


def _scaled(tensor: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """Return ``tensor * factor`` in ``dtype``."""
    if factor == 1:
        return tensor.to(dtype)
    result = torch.empty_like(tensor, dtype=dtype)
    for start in range(0, len(tensor), _ROWS):
        result[start : start + _ROWS] = tensor[start : start + _ROWS].float() * factor
    return result


def _normalized_table(
    table: Tensor, norm_weight: Tensor, architecture: Architecture, dtype: torch.dtype
) -> Tensor:
    """Return the embedding table with the embedding's scale and norm.

    Both act on each token's row by itself, so they can act on the table.
    """
    eps = architecture.settings_of("embedding_norm").epsilon or architecture.eps
    result = torch.empty_like(table, dtype=dtype)
    for start in range(0, len(table), _ROWS):
        rows = table[start : start + _ROWS].float() * architecture.embedding_scale
        result[start : start + _ROWS] = F.rms_norm(rows, norm_weight.shape, norm_weight, eps)
    return result


def _norm_weight(read: Read, architecture: Architecture, name: str, layer: int | None = None) -> Tensor:
    """Return what a norm multiplies with, in fp32, by the neutral name of its weight.

    That is 1 without weights, and 1 more than is stored with zero-centered ones.
    """
    settings = architecture.settings_of(name.removesuffix(".weight"))
    if not settings.weight:
        return torch.ones(architecture.hidden_size)
    stored = read(_GLOBAL_NAMES[name]) if layer is None else read(_LAYER_NAMES[name], layer)
    own = settings.zero_centered
    return stored.float() + (architecture.zero_centered_gamma if own is None else own)


def _order_rotary_pairs(tensors: dict[str, Tensor], architecture: Architecture, target: Target) -> None:
    """Put the channels of queries and keys, and of their norms, in the target's order."""
    if architecture.rope.interleaved == target.interleaved:
        return
    reorder = interleave_rotary_pairs if target.interleaved else separate_rotary_pairs
    for name in tensors:
        if name.startswith(("attention.q.", "attention.k.", "attention.q_norm.", "attention.k_norm.")):
            tensors[name] = reorder(tensors[name], architecture)


def _fold_attention_scale(tensors: dict[str, Tensor], architecture: Architecture) -> None:
    """Scale the queries, or the weight of their norm, instead of the attention scores."""
    if architecture.attention_scale == 1:
        return
    normed = ["attention.q_norm.weight"]
    for name in normed if architecture.qk_norm else ["attention.q.weight", "attention.q.bias"]:
        if name in tensors:
            tensors[name] = tensors[name] * architecture.attention_scale


def _output_eps_factor(architecture: Architecture) -> float:
    """Return what gives the output norms the model's epsilon, as a factor of what they norm.

    ``c * y / sqrt(mean((c * y)**2) + eps)`` is ``y / sqrt(mean(y**2) + eps / c**2)``.
    """
    if not architecture.placement.output or architecture.output_eps == architecture.eps:
        return 1.0
    return (architecture.eps / architecture.output_eps) ** 0.5


def _fold_output_eps(tensors: dict[str, Tensor], architecture: Architecture) -> None:
    if (factor := _output_eps_factor(architecture)) == 1:
        return
    for name in tensors:
        if name.startswith(("attention.proj.", "mlp.down.", "mlp.shared.down.")):
            tensors[name] = tensors[name] * factor


def _fold_gate(tensors: dict[str, Tensor], architecture: Architecture, target: Target) -> None:
    """Give attention that has no gate one of zeros, whose sigmoid is a half."""
    if target.gate and not architecture.attention_gate:
        proj = tensors["attention.proj.weight"]
        tensors["attention.proj.weight"] = proj * 2
        tensors["attention.gate.weight"] = torch.zeros(proj.size(1), proj.size(0))


def _fill_biases(tensors: dict[str, Tensor], architecture: Architecture, target: Target) -> None:
    """Add a bias of zeros after attention, where the target has it together with the queries'."""
    for switched in target.bias_switches.values():
        if switched & architecture.biases and "proj" in switched - architecture.biases:
            tensors["attention.proj.bias"] = torch.zeros(architecture.hidden_size)


# Export


def is_exported_tied(architecture: Architecture, target: Target) -> bool:
    """Tell whether the exported model shares its embedding table with its output layer.

    A norm that is folded into the table stays out of the output layer.
    """
    return architecture.tied and (target.embedding_norm or not architecture.placement.embedding)


def exported_tensors(
    read: Read, architecture: Architecture, target: Target, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and value of every tensor of the exported model.

    Holds one layer but for its experts, one expert, or one table, at a time.

    Parameters
    ----------
    read
        ``Checkpoint.read``.
    architecture, target
        Where the target supports all of the architecture. Rows beyond its vocabulary are left out.
    dtype
        Of what is yielded.
    """
    count = architecture.num_layers
    yield from _exported_embedding(read, architecture, target, dtype)
    for layer in range(count):
        for name, tensor in _exported_layer(read, architecture, target, layer).items():
            kept = torch.float32 if name == _KEPT_IN_FP32 else dtype
            yield target.tensor_name(name, layer, count), tensor.to(kept).contiguous()
        if architecture.experts is not None and architecture.experts.layers[layer]:
            factor = _output_eps_factor(architecture)
            for expert, name, tensor in exported_experts(read, architecture.experts, target, layer, factor):
                yield target.tensor_name(name, layer, count, expert), tensor.to(dtype).contiguous()
        for zeros, rows in target.zeros.items():
            yield zeros.format(layer=layer), torch.zeros(rows, architecture.hidden_size, dtype=dtype)
    yield from _exported_output(read, architecture, target, dtype)


def _exported_embedding(
    read: Read, architecture: Architecture, target: Target, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    table = read(_GLOBAL_NAMES["embedding.weight"])[: architecture.vocab_size]
    name = target.tensor_name("embedding.weight")
    if not architecture.placement.embedding:
        yield name, _scaled(table, architecture.embedding_scale, dtype)
        return
    norm_weight = _norm_weight(read, architecture, "embedding_norm.weight")
    if target.embedding_norm:
        yield name, _scaled(table, architecture.embedding_scale, dtype)
        yield target.tensor_name("embedding_norm.weight"), norm_weight.to(dtype)
    else:
        yield name, _normalized_table(table, norm_weight, architecture, dtype)


def _exported_layer(read: Read, architecture: Architecture, target: Target, layer: int) -> dict[str, Tensor]:
    """Return the tensors of one layer by neutral name, in fp32."""
    tensors = {
        name: _norm_weight(read, architecture, name, layer)
        if "norm" in name
        else read(_LAYER_NAMES[name], layer).float()
        for name in _layer_parameters(architecture, layer)
    }
    for kind in ("weight", "bias"):
        if (fused := tensors.pop(f"attention.qkv.{kind}", None)) is not None:
            parts = zip(qkv_parts(architecture), split_qkv(fused, architecture), strict=True)
            tensors |= {f"attention.{name}.{kind}": part for name, part in parts}
        for mlp in ("mlp", "mlp.shared"):
            if f"{mlp}.gate_up" not in target.names and f"{mlp}.gate_up.{kind}" in tensors:
                gate, up = tensors.pop(f"{mlp}.gate_up.{kind}").chunk(2)
                tensors |= {f"{mlp}.gate.{kind}": gate, f"{mlp}.up.{kind}": up}
    _order_rotary_pairs(tensors, architecture, target)
    _fold_attention_scale(tensors, architecture)
    _fold_output_eps(tensors, architecture)
    _fold_gate(tensors, architecture, target)
    _fill_biases(tensors, architecture, target)
    if (experts := architecture.experts) is not None and experts.layers[layer]:
        assert target.mixture is not None
        fold_shared_switch(tensors, experts, target.mixture)
        fill_shared(tensors, architecture, experts, target.mixture)
    if layer == architecture.num_layers - 1 and not architecture.placement.final:
        factor = _tied_logit_factor(architecture, target)
        tensors["mlp.output_norm.weight"] = tensors["mlp.output_norm.weight"] * factor
    return tensors


def _exported_output(
    read: Read, architecture: Architecture, target: Target, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    if architecture.placement.final:
        norm_weight = _norm_weight(read, architecture, "final_norm.weight")
        norm_weight = norm_weight * _tied_logit_factor(architecture, target)
        yield target.tensor_name("final_norm.weight"), norm_weight.to(dtype)
    if not is_exported_tied(architecture, target):
        name = _GLOBAL_NAMES["embedding.weight" if architecture.tied else "head.weight"]
        yield (
            target.tensor_name("head.weight"),
            _scaled(read(name)[: architecture.vocab_size], architecture.logit_scale, dtype),
        )


def _tied_logit_factor(architecture: Architecture, target: Target) -> float:
    """Return the factor of the last norm, where the output layer can't be scaled by itself.

    Being the embedding's table, it has the embedding's scale.
    """
    if not is_exported_tied(architecture, target):
        return 1.0
    return architecture.logit_scale / architecture.embedding_scale


# Import

Get = Callable[[str], Tensor]


def without_scales(architecture: Architecture) -> Architecture:
    """Return the architecture after `imported_tensor` has folded every multiplier into the weights."""
    return replace(
        architecture, embedding_scale=1.0, logit_scale=1.0, attention_scale=1.0, residual_scale=1.0
    )


def imported_tensor(
    get: Get, architecture: Architecture, target: Target, key: str, layer: int, expert: int = 0
) -> Tensor:
    """Return one tensor in Megatron's layout.

    Parameters
    ----------
    get
        Returns the tensor of a name in the source.
    architecture, target
        Those of the source.
    key
        Of the tensor in Megatron's sharded state, which has no layer's index unless layers differ.
    layer
        The layer's index; 0 for what stands outside the layers.
    expert
        The expert's index; 0 for what is no expert's.
    """

    def part(name: str) -> Tensor:
        return get(target.tensor_name(name, layer, architecture.num_layers, expert))

    name = _NEUTRAL_NAMES[_LAYER_INDEX.sub("", key)]
    module, _, kind = name.rpartition(".")
    if module == "attention.qkv":
        q, *others = (part(f"attention.{each}.{kind}") for each in qkv_parts(architecture))
        scale = 1.0 if architecture.qk_norm else architecture.attention_scale
        return join_qkv(_times(q, scale), *others, architecture=architecture)
    if module.endswith(".gate_up") and module not in target.names:
        mlp = module.removesuffix(".gate_up")
        return torch.cat([part(f"{mlp}.gate.{kind}"), part(f"{mlp}.up.{kind}")])
    return _times(part(name), _import_factor(architecture, module))


def _import_factor(architecture: Architecture, module: str) -> float:
    """Return what a module's tensors are multiplied with, so that the model needs no multipliers."""
    logits = architecture.logit_scale
    scales = {
        "embedding": architecture.embedding_scale,
        "attention.q_norm": architecture.attention_scale,
        # A tied output layer has the embedding's scale, so the final norm takes both.
        "final_norm": logits / architecture.embedding_scale if architecture.tied else 1.0,
        "head": logits,
    }
    ends = ("output_norm",) if architecture.placement.output else ("proj", "down")
    scales |= {
        f"{sublayer}.{end}": architecture.residual_scale for sublayer in ("attention", "mlp") for end in ends
    }
    return scales.get(module, 1.0)


def _times(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1 else (tensor.float() * factor).to(tensor.dtype)
