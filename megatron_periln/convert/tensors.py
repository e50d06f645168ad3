"""The tensors of an exported model, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megatron_periln.convert import folds
from megatron_periln.convert.architecture import Architecture
from megatron_periln.convert.layout import split_qkv
from megatron_periln.convert.roles import GLOBAL_NAMES, LAYER_NAMES, layer_roles
from megatron_periln.convert.targets import Target

__all__ = ["exported_tensors", "is_exported_tied"]

Read = Callable[..., Tensor]


def is_exported_tied(architecture: Architecture, target: Target) -> bool:
    """Tell whether the exported model shares its embedding table with its output layer.

    A norm that is folded into the table stays out of the output layer.
    """
    return architecture.tied and (target.embedding_norm or not architecture.placement.embedding)


def exported_tensors(
    read: Read, architecture: Architecture, target: Target, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and value of every tensor of the exported model.

    Holds one layer, or one table, at a time.

    Parameters
    ----------
    read
        ``Checkpoint.read``.
    architecture, target
        Without ``misfits``.
    dtype
        Of what is yielded.
    """
    count = architecture.num_layers
    yield from _embedding(read, architecture, target, dtype)
    for layer in range(count):
        for role, tensor in _layer(read, architecture, target, layer).items():
            yield target.tensor_name(role, layer, count), tensor.to(dtype).contiguous()
        for name, rows in target.zeros.items():
            yield name.format(layer=layer), torch.zeros(rows, architecture.hidden_size, dtype=dtype)
    yield from _output(read, architecture, target, dtype)


def _embedding(
    read: Read, architecture: Architecture, target: Target, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    table, name = read(GLOBAL_NAMES["embedding.weight"]), target.tensor_name("embedding.weight")
    if not architecture.placement.embedding:
        yield name, folds.scaled(table, architecture.embedding_scale, dtype)
        return
    gain = folds.full_gain(read(GLOBAL_NAMES["embedding_norm.weight"]), architecture)
    if target.embedding_norm:
        yield name, folds.scaled(table, architecture.embedding_scale, dtype)
        yield target.tensor_name("embedding_norm.weight"), gain.to(dtype)
    else:
        yield name, folds.normalized_table(table, gain, architecture, dtype)


def _layer(read: Read, architecture: Architecture, target: Target, layer: int) -> dict[str, Tensor]:
    """Return the tensors of one layer by role, in fp32."""
    tensors = {role: read(LAYER_NAMES[role], layer).float() for role in layer_roles(architecture)}
    for role in tensors:
        if "norm" in role:
            tensors[role] = folds.full_gain(tensors[role], architecture)
    for kind in ("weight", "bias"):
        if (fused := tensors.pop(f"attention.qkv.{kind}", None)) is not None:
            parts = zip("qkv", split_qkv(fused, architecture), strict=True)
            tensors |= {f"attention.{name}.{kind}": part for name, part in parts}
        if "mlp.gate_up" not in target.names and f"mlp.gate_up.{kind}" in tensors:
            gate, up = tensors.pop(f"mlp.gate_up.{kind}").chunk(2)
            tensors |= {f"mlp.gate.{kind}": gate, f"mlp.up.{kind}": up}
    folds.order_rotary_pairs(tensors, architecture, target)
    folds.scale_attention(tensors, architecture)
    folds.fold_output_eps(tensors, architecture)
    folds.fill_biases(tensors, architecture, target)
    if layer == architecture.num_layers - 1 and not architecture.placement.final:
        factor = _tied_logit_factor(architecture, target)
        tensors["mlp.output_norm.weight"] = tensors["mlp.output_norm.weight"] * factor
    return tensors


def _output(
    read: Read, architecture: Architecture, target: Target, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    if architecture.placement.final:
        gain = folds.full_gain(read(GLOBAL_NAMES["final_norm.weight"]), architecture)
        gain = gain * _tied_logit_factor(architecture, target)
        yield target.tensor_name("final_norm.weight"), gain.to(dtype)
    if not is_exported_tied(architecture, target):
        name = GLOBAL_NAMES["embedding.weight" if architecture.tied else "head.weight"]
        yield target.tensor_name("head.weight"), folds.scaled(read(name), architecture.logit_scale, dtype)


def _tied_logit_factor(architecture: Architecture, target: Target) -> float:
    """Return the factor of the last norm, where the output layer can't be scaled by itself.

    Being the embedding's table, it has the embedding's scale.
    """
    if not is_exported_tied(architecture, target):
        return 1.0
    return architecture.logit_scale / architecture.embedding_scale
