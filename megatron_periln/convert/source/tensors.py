"""The tensors of a model to be imported: by name, dtype and shape those that its config.json promises."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_periln.convert.architecture import Architecture
from megatron_periln.convert.safetensors_folder import Tensors
from megatron_periln.convert.source.configuration import Statements
from megatron_periln.convert.targets import Target
from megatron_periln.errors import UsageError

__all__ = ["check_tensors"]

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_UNREAD = re.compile(r"(^|\.)rotary_emb\.inv_freq$")  # what transformers does not read either
_ADAPTER = re.compile(r"\.(base_layer|lora_[A-Za-z_]+)\.")  # of PEFT
_SEVERAL = 3  # of the names in a list


@dataclass(frozen=True)
class _Size:
    """A dimension of a tensor, as a key of the configuration gives it.

    Parameters
    ----------
    key, value
        The key, and its value.
    unit
        Rows, or columns, for each.
    beside
        What the unit comes of.
    """

    key: str
    value: int
    unit: int = 1
    beside: str = ""

    @property
    def total(self) -> int:
        return self.value * self.unit


@dataclass(frozen=True)
class _Expected:
    name: str
    shape: tuple[_Size, ...]
    switch: str | None = None
    """The key by which the tensor is there at all, if one decides it."""


def check_tensors(tensors: Tensors, architecture: Architecture, target: Target, said: Statements) -> None:
    """Refuse tensors that are not those that the configuration promises.

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
        For the first dtype, number of layers, shape or name that disagrees, with the key and both values; and
        for an output layer of its own that the configuration calls tied.
    """
    for name in tensors:
        dtype = tensors.layout(name).dtype
        if dtype not in _DTYPES and not _UNREAD.search(name):
            raise UsageError(
                f"{tensors.path(name)} has {name} in {dtype}, and only {', '.join(_DTYPES.values())} are "
                "imported; of a quantized model, give the one from which it was made"
            )
    _check_layers(tensors, architecture, target, said)
    expected = list(_expected(architecture, target))
    _check_shapes(tensors, expected, said)
    _check_names(tensors, expected, architecture, target, said)
    _check_logit_biases(tensors, architecture, target)
    head, table = target.tensor_name("head.weight"), target.tensor_name("embedding.weight")
    if architecture.tied and head in tensors and not tensors.equal(head, table):
        raise UsageError(
            f"{said.quote('tie_word_embeddings', True)}, and {tensors.path(head)} has {head}, another table "
            f'than {table}; write "tie_word_embeddings": false there to keep both, or take {head} out'
        )


def _check_layers(tensors: Tensors, architecture: Architecture, target: Target, said: Statements) -> None:
    layers = {int(found[1]) for name in tensors if (found := _LAYER.match(name))}
    if not layers:
        raise UsageError(
            f"{tensors.folder} has {_several(list(tensors))}, and no tensor called model.layers.0...., as "
            f"{target.architecture} has them in files; write the folder with its save_pretrained"
        )
    if layers != set(range(architecture.num_layers)):
        count = (
            f"{len(layers)} layers" if layers == set(range(len(layers))) else f"the layers {sorted(layers)}"
        )
        raise UsageError(
            f"{said.quote('num_hidden_layers', architecture.num_layers)}, and the tensors in "
            f"{tensors.folder} are of {count}; correct the number, or download the model again"
        )


def _expected(architecture: Architecture, target: Target) -> Iterator[_Expected]:
    """Yield the tensors that must be there."""
    groups = {"attention.q": "qkv", "attention.k": "qkv", "attention.v": "qkv", "attention.proj": "proj"}
    shapes = _shapes(architecture, target)
    for module in target.names:
        if module.startswith("last.") or (module == "head" and architecture.tied):
            continue
        group = groups.get(module, "mlp" if module.startswith("mlp.") and "norm" not in module else "")
        switch = next((key for key, biases in target.bias_switches.items() if group in biases), None)
        for layer in _layers_with(module, architecture):
            for expert in range(_count(module, architecture)):

                def name(kind: str, module: str = module, layer: int = layer, expert: int = expert) -> str:
                    parameter = module if module in _WHOLE else f"{module}.{kind}"
                    return target.tensor_name(parameter, layer, architecture.num_layers, expert)

                yield _Expected(name("weight"), shapes[module], _switch_of(module, target))
                if group in architecture.biases:
                    yield _Expected(name("bias"), shapes[module][:1], switch)
    hidden = _Size("hidden_size", architecture.hidden_size)
    for zeros, rows in target.zeros.items():
        for layer in range(architecture.num_layers):
            yield _Expected(zeros.format(layer=layer), (_Size("num_local_experts", rows), hidden))


_WHOLE = frozenset({"mlp.expert_bias"})
"""Neutral names that are no module's weight or bias."""

_EVERY_MLP = frozenset({"mlp.input_norm", "mlp.output_norm"})
_OF_EXPERTS = ("mlp.router", "mlp.expert_bias", "mlp.experts.", "mlp.shared.")


def _layers_with(module: str, architecture: Architecture) -> list[int]:
    """Return the layers that have a module; that of layer 0 stands for what is outside the layers."""
    if not module.startswith(("attention.", "mlp.")):
        return [0]
    if module in ("attention.q_norm", "attention.k_norm") and not architecture.qk_norm:
        return []
    layers = list(range(architecture.num_layers))
    experts = architecture.experts
    if experts is None or module.startswith("attention.") or module in _EVERY_MLP:
        return layers
    return [layer for layer in layers if experts.layers[layer] == module.startswith(_OF_EXPERTS)]


def _count(module: str, architecture: Architecture) -> int:
    experts = architecture.experts
    return experts.count if experts is not None and module.startswith("mlp.experts.") else 1


def _switch_of(module: str, target: Target) -> str | None:
    """Return the key by which a module is there at all, if one decides it."""
    if module in ("attention.q_norm", "attention.k_norm") and isinstance(target.qk_norm, str):
        return target.qk_norm
    return "tie_word_embeddings" if module == "head" else None


def _shapes(architecture: Architecture, target: Target) -> dict[str, tuple[_Size, ...]]:
    """Return the shape of each module's weight; the first dimension is that of its bias."""
    each = architecture.head_dim
    sizes = f"num_attention_heads {architecture.num_heads}, hidden_size {architecture.hidden_size}"
    hidden = _Size("hidden_size", architecture.hidden_size)
    vocabulary = _Size("vocab_size", architecture.vocab_size)
    width = _Size("intermediate_size", architecture.ffn_hidden_size)
    both = _Size("intermediate_size", architecture.ffn_hidden_size, 2, "gate and up together")
    beside = f"head_dim {each}, {sizes}"
    heads = _Size("num_attention_heads", architecture.num_heads, each, beside)
    groups = _Size("num_key_value_heads", architecture.num_kv_heads, each, beside)
    channels = _Size("head_dim", each)
    return {
        "embedding": (vocabulary, hidden),
        "embedding_norm": (hidden,),
        "final_norm": (hidden,),
        "head": (vocabulary, hidden),
        "attention.input_norm": (hidden,),
        "attention.output_norm": (hidden,),
        "attention.q_norm": (heads if architecture.whole_qk_norm else channels,),
        "attention.k_norm": (groups if architecture.whole_qk_norm else channels,),
        "attention.q": (heads, hidden),
        "attention.k": (groups, hidden),
        "attention.v": (groups, hidden),
        "attention.proj": (hidden, heads),
        "attention.gate": (heads, hidden),
        "mlp.input_norm": (hidden,),
        "mlp.output_norm": (hidden,),
        "mlp.gate_up": (both, hidden),
        "mlp.gate": (width, hidden),
        "mlp.up": (width, hidden),
        "mlp.down": (hidden, width),
        **_expert_shapes(architecture, target, hidden),
    }


def _expert_shapes(architecture: Architecture, target: Target, hidden: _Size) -> dict[str, tuple[_Size, ...]]:
    experts, mixture = architecture.experts, target.mixture
    if experts is None or mixture is None:
        return {}
    count = _Size(mixture.count, experts.count)
    width = _Size(mixture.width, experts.width)
    shared = _Size(mixture.shared_width or "", experts.shared_width)
    if mixture.shared_count is not None:
        number, beside = experts.shared_width // experts.width, f"{mixture.width} {experts.width}"
        shared = _Size(mixture.shared_count, number, experts.width, beside)
    return {
        "mlp.router": (count, hidden),
        "mlp.expert_bias": (count,),
        "mlp.experts.gate": (width, hidden),
        "mlp.experts.up": (width, hidden),
        "mlp.experts.down": (hidden, width),
        "mlp.shared.gate": (shared, hidden),
        "mlp.shared.up": (shared, hidden),
        "mlp.shared.down": (hidden, shared),
        "mlp.shared.switch": (_Size("", 1), hidden),
    }


def _check_shapes(tensors: Tensors, expected: list[_Expected], said: Statements) -> None:
    # First those that tell a size by itself: the norm of queries has a head's channels.
    for each in sorted(expected, key=lambda each: any(size.unit != 1 for size in each.shape)):
        if each.name not in tensors:
            continue
        shape = tensors.layout(each.name).shape
        where = f"{tensors.path(each.name)} has {each.name}"
        if len(shape) != len(each.shape):
            raise UsageError(
                f"{where} of shape {shape}, and {said.path} promises {[size.total for size in each.shape]}"
            )
        for size, found in zip(each.shape, shape, strict=True):
            if size.total != found:
                raise UsageError(
                    f"{said.quote(size.key, size.value)}{_meaning(size, found)} {where} of shape {shape}"
                )


def _meaning(size: _Size, found: int) -> str:
    """Return what a value of the configuration means for a dimension, and what the tensor says instead."""
    whole = f"{found // size.unit}" if found % size.unit == 0 else f"{found / size.unit:g}"
    if size.unit == 1:
        return f", and its tensors {whole}:"
    return f" ({size.beside}: {size.total}), and its tensors {whole} ({found}):"


def _check_names(
    tensors: Tensors, expected: list[_Expected], architecture: Architecture, target: Target, said: Statements
) -> None:
    names = {each.name for each in expected}
    if architecture.tied:
        names.add(target.tensor_name("head.weight"))
    more = [name for name in tensors if name not in names and not _UNREAD.search(name)]
    if adapters := [name for name in more if _ADAPTER.search(name)]:
        raise UsageError(
            f"{tensors.path(adapters[0])} has {_several(adapters)}: an adapter that is not merged; write the "
            "folder after merge_and_unload() of PEFT"
        )
    for each in expected:
        if each.name not in tensors:
            value: Any = each.switch != "tie_word_embeddings"
            why = f"{said.quote(each.switch, value)}" if each.switch else f"{said.path} promises it"
            raise UsageError(
                f"{tensors.folder} has no tensor {each.name}, and {why}; download the model again"
            )
    if more:
        raise UsageError(
            f"{tensors.path(more[0])} has {_several(more)}, for which {target.architecture} has no place"
            f"{_switch(more, target, said)}"
        )


def _several(names: list[str]) -> str:
    more = len(names) - _SEVERAL
    return ", ".join(names[:_SEVERAL]) + (f" and {more} more" if more > 0 else "")


def _check_logit_biases(tensors: Tensors, architecture: Architecture, target: Target) -> None:
    if target.mixture is None or not target.mixture.logit_bias:
        return
    for layer in _layers_with("mlp.expert_bias", architecture):
        name = target.tensor_name("mlp.expert_bias", layer)
        if tensors[name].any():
            raise UsageError(
                f"{tensors.path(name)} has {name}, which is added to the logits of experts; Megatron adds a "
                "bias to their sigmoids, so that it would choose others"
            )


def _switch(more: list[str], target: Target, said: Statements) -> str:
    """Return the key that keeps biases out, if it is biases that have no place."""
    switches = [key for key in target.bias_switches if more[0].endswith(".bias")]
    return f": {said.path} says false, or nothing, for {' and '.join(switches)}" if switches else ""
