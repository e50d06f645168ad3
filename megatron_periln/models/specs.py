"""Editing Megatron's layer specs without touching the originals."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec

__all__ = ["change_attention", "substitute", "with_l2_norms", "with_submodules"]


def with_submodules(spec: Any, submodules: Any) -> Any:
    """Return a copy of ``spec``, a ``ModuleSpec`` or a ``functools.partial``, with other submodules."""
    if isinstance(spec, functools.partial):
        return functools.partial(spec.func, *spec.args, **{**spec.keywords, "submodules": submodules})
    spec = copy.copy(spec)
    spec.submodules = submodules
    return spec


def substitute(spec: Any, table: Mapping[Any, Any]) -> Any:
    """Return ``spec`` with every module that is a key of ``table`` replaced by its value.

    Parameters
    ----------
    spec
        Anything Megatron calls a spec: ``ModuleSpec``, a dataclass of submodules, a
        ``functools.partial`` with a ``submodules`` keyword, a list of those, or a module class.
    table
        From module classes to the classes that take their place.
    """
    if isinstance(spec, list):
        return [substitute(item, table) for item in spec]
    if isinstance(spec, ModuleSpec):
        spec = with_submodules(spec, substitute(spec.submodules, table))
        spec.module = table.get(spec.module, spec.module)
        return spec
    if isinstance(spec, functools.partial):
        if "submodules" not in spec.keywords:
            return spec
        return with_submodules(spec, substitute(spec.keywords["submodules"], table))
    if is_dataclass(spec) and not isinstance(spec, type):
        return replace(spec, **{f.name: substitute(getattr(spec, f.name), table) for f in fields(spec)})
    return table.get(spec, spec) if isinstance(spec, type) else spec


def with_l2_norms(spec: Any) -> Any:
    """Return ``spec`` with the norms of queries and keys left to ``qk_l2_norm``; `substitute` says of what.

    Upstream's attention then takes its ``L2Norm``; its local specs of dense and of hybrid layers say that
    there is none.
    """

    def without(attention: SelfAttentionSubmodules) -> SelfAttentionSubmodules:
        norms = {"q_layernorm": attention.q_layernorm, "k_layernorm": attention.k_layernorm}
        return replace(attention, **{name: None for name, norm in norms.items() if norm is IdentityOp})

    return change_attention(spec, without)


def change_attention(spec: Any, change: Callable[[SelfAttentionSubmodules], SelfAttentionSubmodules]) -> Any:
    """Return ``spec`` with the submodules of each self-attention changed; `substitute` says of what."""
    if isinstance(spec, list):
        return [change_attention(item, change) for item in spec]
    if isinstance(spec, SelfAttentionSubmodules):
        return change(spec)
    if isinstance(spec, ModuleSpec):
        return with_submodules(spec, change_attention(spec.submodules, change))
    if isinstance(spec, functools.partial) and "submodules" in spec.keywords:
        return with_submodules(spec, change_attention(spec.keywords["submodules"], change))
    if is_dataclass(spec) and not isinstance(spec, type):
        changed = {field.name: change_attention(getattr(spec, field.name), change) for field in fields(spec)}
        return replace(spec, **changed)
    return spec
