"""Tensors that were written as transformers 5 has them in memory, under the names of published files.

In memory, a layer's experts are two tensors: ``mlp.experts.gate_up_proj``, of shape (experts, gate and up
rows, hidden size), and ``mlp.experts.down_proj``, of shape (experts, hidden size, width). ``save_pretrained``
gives each expert its own tensors again, but not with ``save_original_format=False``; nor do programs that
write a ``state_dict()`` themselves. Some other names are not the files' either (``Target.in_memory``).

Source: ``conversion_mapping.py`` and ``integrations/moe.py`` in transformers 5.23.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from megatron_periln.convert.architecture import Architecture
from megatron_periln.convert.safetensors_folder import Part, Tensors
from megatron_periln.convert.source.configuration import Statements
from megatron_periln.convert.targets import Target
from megatron_periln.errors import UsageError

__all__ = ["under_names_of_files"]

_FUSED = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up|down)_proj")


def under_names_of_files(
    tensors: Tensors, architecture: Architecture, target: Target, said: Statements
) -> Tensors:
    """Return tensors under the names that they have in published files, whichever they were written with.

    Parameters
    ----------
    tensors
        Of the model's files.
    architecture, target
        What the configuration says.
    said
        The configuration, to be quoted.

    Raises
    ------
    UsageError
        If a tensor of experts has not the shape that transformers gives it, or a tensor is there under both
        names.
    """
    experts = _expert_names(target)
    other_names = _names_in_files(target, architecture.num_layers)
    parts: dict[str, Part] = {}
    for stored in tensors:
        fused = _FUSED.fullmatch(stored)
        if fused and experts:
            _check_shape(tensors, stored, fused[2], architecture, target, said)
            named = list(_parts_of_experts(stored, fused, experts, architecture))
        else:
            module = stored.removesuffix(".weight")
            named = [(other_names.get(module, module) + stored[len(module) :], Part(stored))]
        for name, part in named:
            if name in parts:
                raise UsageError(
                    f"{tensors.folder} has {name} twice, in {parts[name].stored} and in {stored}; take out "
                    "the one that is not the model's"
                )
            parts[name] = part
    return tensors.under(parts)


def _expert_names(target: Target) -> dict[str, str] | None:
    """Return the names that an expert's modules have in files; None for targets without experts."""
    prefix = "mlp.experts." if target.mixture else "mlp."
    names = {
        kind: target.names[prefix + kind] for kind in ("gate", "up", "down") if prefix + kind in target.names
    }
    return names if ".experts." in names.get("down", "") else None


def _names_in_files(target: Target, num_layers: int) -> dict[str, str]:
    """Return the names in files of the modules that have another in memory."""
    templates = [*target.names.values(), *(name.removesuffix(".weight") for name in target.zeros)]
    names = [
        template.format(layer=layer, next=layer + 1)
        for template in templates
        if ".experts." not in template
        for layer in range(num_layers)
    ]
    return {
        name.replace(in_files, in_memory): name
        for in_files, in_memory in target.in_memory.items()
        for name in names
        if in_files in name
    }


def _parts_of_experts(
    stored: str, fused: re.Match[str], experts: dict[str, str], architecture: Architecture
) -> Iterator[tuple[str, Part]]:
    count, width = _sizes(architecture)
    gate_and_up = {"gate": slice(0, width), "up": slice(width, 2 * width)}
    for kind, rows in (gate_and_up if fused[2] == "gate_up" else {"down": slice(None)}).items():
        for expert in range(count):
            name = experts[kind].format(layer=fused[1], expert=expert)
            yield f"{name}.weight", Part(stored, expert, rows)


def _sizes(architecture: Architecture) -> tuple[int, int]:
    """Return how many experts a layer has in files, and how wide each is."""
    experts = architecture.experts
    return (1, architecture.ffn_hidden_size) if experts is None else (experts.count, experts.width)


def _check_shape(
    tensors: Tensors, stored: str, kind: str, architecture: Architecture, target: Target, said: Statements
) -> None:
    count, width = _sizes(architecture)
    hidden = architecture.hidden_size
    mixture = target.mixture
    keys = (mixture.count, mixture.width) if mixture else ("num_local_experts", "intermediate_size")
    right = [count, 2 * width, hidden] if kind == "gate_up" else [count, hidden, width]
    shape = tensors.layout(stored).shape
    if shape == right:
        return
    transposed = shape == [right[0], right[2], right[1]]
    why = (
        "its matrices are transposed, as transformers doesn't read them; transpose them"
        if transposed
        else "correct the configuration, or download the model again"
    )
    raise UsageError(
        f"{tensors.path(stored)} has {stored} of shape {shape}, and {said.path} promises {right} "
        f"({keys[0]} {count}, {keys[1]} {width}, hidden_size {hidden}): {why}"
    )
