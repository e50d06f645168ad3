"""Editing Megatron's layer specs without touching the originals."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec

__all__ = ["substitute", "with_l2_norms", "with_submodules"]


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
    if isinstance(spec, list):
        return [with_l2_norms(item) for item in spec]
    if isinstance(spec, SelfAttentionSubmodules):
        norms = {"q_layernorm": spec.q_layernorm, "k_layernorm": spec.k_layernorm}
        return replace(spec, **{name: None for name, norm in norms.items() if norm is IdentityOp})
    if isinstance(spec, ModuleSpec):
        return with_submodules(spec, with_l2_norms(spec.submodules))
    if isinstance(spec, functools.partial) and "submodules" in spec.keywords:
        return with_submodules(spec, with_l2_norms(spec.keywords["submodules"]))
    if is_dataclass(spec) and not isinstance(spec, type):
        return replace(spec, **{f.name: with_l2_norms(getattr(spec, f.name)) for f in fields(spec)})
    return spec
