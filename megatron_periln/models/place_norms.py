"""Place norms in Megatron's layer specs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from megatron.core.extensions import transformer_engine as te
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.ssm.mamba_layer import MambaLayerSubmodules
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec, get_submodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import nn

from megatron_periln.checkpoints.reader import NORM_BEFORE_EXPERTS
from megatron_periln.models.residual_adds import SLOTS
from megatron_periln.models.specs import with_submodules
from megatron_periln.norms import (
    MODELS,
    EngineInputNorm,
    FusedInputNorm,
    InputNorm,
    NoNorm,
    NormedBiasDropoutAdd,
    NormPlacement,
    ScaledInputNorm,
    SublayerRule,
)
from megatron_periln.norms.arguments import why_norms_stay_apart
from megatron_periln.norms.formulas import Place

__all__ = ["final_norm", "place_norms"]

# The linears whose input is the residual stream, and what each becomes when Transformer Engine
# must not normalize that input. Other fused linears (q_up, kv_up) hold query and key norms.
_STREAM_LINEARS: dict[str, type] = {
    "linear_qkv": te.TEColumnParallelLinear,
    "linear_qkv_down_proj": te.TEColumnParallelLinear,
    "linear_fc1": te.TEColumnParallelLinear,
    "in_proj": te.TEColumnParallelLinear,  # of Mamba layers and gated delta nets
}

# Transformer Engine's norms that stand by themselves.
_ENGINE_NORMS = (te.TENorm, TESpecProvider().layer_norm(has_residual=True))

# The keys under which a layer's input norms are saved, in Transformer Engine's linears or before them.
# Latent attention's is saved under its own name.
_ATTENTION_NORM_KEYS = {
    linear: {"input_layernorm.": f"self_attention.{linear}.layer_norm_"}
    for linear in ("linear_qkv", "in_proj")
}
_MLP_NORM_KEY = dict([NORM_BEFORE_EXPERTS[::-1]])


def place_norms[Spec](
    spec: Spec,
    placement: NormPlacement,
    config: TransformerConfig,
    *,
    fuse_pre_mlp_norm: bool = False,
    first_layer: int = 1,
) -> Spec:
    """Return ``spec`` with its norms placed; ``spec`` itself is left as it was.

    Parameters
    ----------
    spec
        One of Megatron's own: a ``ModuleSpec`` of a transformer layer, of a Mamba layer or of a
        multi-token prediction layer, ``TransformerBlockSubmodules`` or
        ``MultiTokenPredictionBlockSubmodules``; local or Transformer Engine; dense, MoE, multi-latent
        attention or gated delta net.
    placement
        Where the norms stand.
    config
        The model's configuration, for the norms' kind, epsilon, dtype and parallelism.
    fuse_pre_mlp_norm
        Whether attention's output norm and the MLP's input norm become one kernel: the input norm then
        stands before the MLP's first linear, not in it. `megatron_periln.models.finish.finish_model` connects
        them.
    first_layer
        Which of the model's layers the spec is of, counted from 1, or its first: the placement may have other
        norms in others. Scales are left to `finish_model`.

    Returns
    -------
    Spec
        Pre-LN needs no change. With an input norm, Transformer Engine's norm stays fused into the
        first linear, unless ``recompute_modules`` has ``layernorm`` or ``fused_residual_rmsnorm`` is on:
        both are about a norm that stands by itself. Without an input norm, that linear becomes a plain
        linear. Without a final norm, a block has none. With ``fp32_residual_connection``, Transformer
        Engine's norms of the residual stream give way to our own, Pre-LN's too: its linears take no fp32
        input, and its norms round theirs.

    Raises
    ------
    TypeError
        If ``spec`` is none of these.
    ValueError
        If ``spec`` fuses an input norm where it can't be taken out, and the placement has none: the
        operation fuser, heterogeneous and inference-optimized layers; or if inference would skip
        the bias-dropout-adds (``inference_fuse_tp_communication``); or if ``fuse_pre_mlp_norm`` has not both
        norms to fuse, or recomputes one of them; or if ``fused_residual_rmsnorm`` has an fp32 residual.
    """
    if config.inference_fuse_tp_communication and not placement.adds_plainly:
        raise ValueError(
            f"inference_fuse_tp_communication adds the residual without norm placement {placement.name!r}'s "
            "norm; turn it off or choose pre"
        )
    place: Callable[..., Any] = functools.partial(
        place_norms, placement=placement, config=config, fuse_pre_mlp_norm=fuse_pre_mlp_norm
    )
    if isinstance(spec, TransformerBlockSubmodules | MultiTokenPredictionBlockSubmodules):
        layers = enumerate(spec.layer_specs or [], first_layer)
        changes: dict[str, Any] = {"layer_specs": [place(layer, first_layer=i) for i, layer in layers]}
        if isinstance(spec, TransformerBlockSubmodules):
            changes |= _norms_of_stream(spec, config, "layer_norm")
            changes |= _final_norm(spec, placement)
        return replace(spec, **changes)
    if isinstance(spec, MultiTokenPredictionLayerSubmodules):
        # A hybrid model has none here, but builds a stack of its own layers.
        changes = {"mtp_model_layer": spec.mtp_model_layer and place(spec.mtp_model_layer)}
        changes |= _norms_of_stream(spec, config, "enorm", "hnorm", "layer_norm")
        return replace(spec, **changes | _final_norm(spec, placement))
    if isinstance(spec, MambaLayerSubmodules):
        rules = _rules(placement, config, first_layer)
        bdas = _normed_bdas(spec, placement, config, rules)
        return replace(spec, **bdas, **_input_norm_of_mamba(spec, placement))
    if isinstance(spec, TransformerLayerSubmodules):
        if fuse_pre_mlp_norm:
            _check_fusion(spec, placement, config)
        rules = _rules(placement, config, first_layer)
        bdas = _normed_bdas(spec, placement, config, rules)
        placed = replace(spec, **bdas, **_without_input_norms(spec, placement, rules))
        if _has_own_input_norms(placement):
            placed = _with_own_input_norms(placed, placement, config, rules)
        elif placement.input and config.fp32_residual_connection:
            placed = _with_norms_of_fp32_stream(placed, config)
        elif placement.input and placement.output and _wants_input_norms_apart(config):
            placed = _with_separate_input_norms(
                placed,
                separate_norm,
                "recompute_modules layernorm and fused_residual_rmsnorm want it by itself; drop them",
            )
        return _with_fused_norm(placed, placement) if fuse_pre_mlp_norm else placed
    if isinstance(spec, ModuleSpec) and spec.submodules is not None:
        return with_submodules(spec, place(spec.submodules, first_layer=first_layer))
    raise TypeError(f"place_norms takes a layer or block spec of Megatron's, not {spec!r}")


Rules = dict[bool, SublayerRule]
"""The rule of a layer's attention, under True, and that of its MLP, under False."""


def _rules(placement: NormPlacement, config: TransformerConfig, layer: int) -> Rules:
    hybrid, layers = config.is_hybrid_model, config.num_layers
    layer = 1 if hybrid else layer  # a hybrid model has one spec for all its layers of a kind
    return {kind: placement.at(Place.of_layer(layer, layers, kind, hybrid)) for kind in (True, False)}


def _normed_bdas(
    layer: TransformerLayerSubmodules | MambaLayerSubmodules,
    placement: NormPlacement,
    config: TransformerConfig,
    rules: Rules,
) -> dict[str, ModuleSpec]:
    bdas = {}
    for name in SLOTS:
        rule = rules[name != "mlp_bda"]
        plain = placement.adds_plainly if config.is_hybrid_model else rule.adds_plainly
        if not plain and getattr(layer, name, IdentityFuncOp) is not IdentityFuncOp:
            params = {"config": config, "placement": placement, "rule": rule}
            bdas[name] = ModuleSpec(module=NormedBiasDropoutAdd, params=params)
    return bdas


def _final_norm(
    spec: TransformerBlockSubmodules | MultiTokenPredictionLayerSubmodules, placement: NormPlacement
) -> dict[str, Any]:
    """Return what stands for a final norm that the placement has not, or with settings of its own."""
    if not placement.final:
        return {"layer_norm": NoNorm}
    return {"layer_norm": final_norm(spec.layer_norm, placement)} if placement.norms.final != MODELS else {}


def final_norm(of: Any, placement: NormPlacement) -> Callable[..., nn.Module]:
    """Return what builds a final norm with the placement's settings, saved as ``of`` is."""
    norm = EngineInputNorm if of in (*_ENGINE_NORMS, EngineInputNorm) else InputNorm
    return functools.partial(norm, settings=placement.norms.final)


def _input_norm_of_mamba(layer: MambaLayerSubmodules, placement: NormPlacement) -> dict[str, Any]:
    """Return what changes for a placement without input norms, or with norms of our own.

    Else it stays where upstream has it. There it takes the stream in the parameters' dtype also if that is
    fp32: the layer rounds it before.
    """
    if not placement.input:
        return {"norm": NoNorm, "mixer": _unfuse_input_norm(layer.mixer, _without_input_norm(placement))}
    if not _has_own_input_norms(placement):
        return {}
    keys = {"norm.": "mixer.in_proj.layer_norm_"}
    return {
        "norm": _own_input_norm(placement),
        "mixer": _unfuse_input_norm(layer.mixer, _OWN_INPUT_NORM),
        "sharded_state_dict_keys_map": {**layer.sharded_state_dict_keys_map, **keys},
    }


def _without_input_norm(placement: NormPlacement) -> str:
    return f"norm placement {placement.name!r} has no input norm; choose pre or peri"


def _without_input_norms(
    layer: TransformerLayerSubmodules, placement: NormPlacement, rules: Rules
) -> dict[str, Any]:
    why, changes = _without_input_norm(placement), dict[str, Any]()
    if not rules[True].input:
        changes |= {
            "input_layernorm": NoNorm,
            "self_attention": _unfuse_input_norm(layer.self_attention, why),
        }
    if not rules[False].input:
        changes |= {"pre_mlp_layernorm": NoNorm, "mlp": _unfuse_input_norm(layer.mlp, why)}
    return changes


_OWN_INPUT_NORM = "its rule wants that norm by itself; choose another norm placement"


def _has_own_input_norms(placement: NormPlacement) -> bool:
    """Tell whether its input norms are ours, as they are with a scale or with settings of their own."""
    return placement.input_scale != 1.0 or placement.norms.input != MODELS


def _own_input_norm(placement: NormPlacement, norm: type[InputNorm] = InputNorm) -> Callable[..., nn.Module]:
    settings = placement.norms.input
    return norm if settings == MODELS else functools.partial(norm, settings=settings)


def _with_own_input_norms(
    layer: TransformerLayerSubmodules, placement: NormPlacement, config: TransformerConfig, rules: Rules
) -> TransformerLayerSubmodules:
    """Put a norm of ours, with its scale and settings, in the place of each input norm."""
    if config.fused_residual_rmsnorm:
        raise ValueError(
            "--fused-residual-rmsnorm computes input norms without a scale or settings of their own; drop it"
        )
    norm = _own_input_norm(placement, ScaledInputNorm if placement.input_scale != 1.0 else InputNorm)
    apart = _with_separate_input_norms(layer, norm, _OWN_INPUT_NORM)
    names = {True: "input_layernorm", False: "pre_mlp_layernorm"}
    sublayers = {True: layer.self_attention, False: layer.mlp}
    own = {
        names[kind]: norm for kind, rule in rules.items() if rule.input and sublayers[kind] is not IdentityOp
    }
    return replace(apart, **own)


def _check_fusion(
    layer: TransformerLayerSubmodules, placement: NormPlacement, config: TransformerConfig
) -> None:
    reason = why_norms_stay_apart(
        placement,
        whole_layers=IdentityFuncOp not in (layer.self_attn_bda, layer.mlp_bda),
        recomputed=_recomputed(config),
        offloaded=(config.offload_modules or ()) if config.fine_grained_activation_offloading else (),
    )
    if reason is not None:
        raise ValueError(reason)


def separate_norm(config: TransformerConfig, hidden_size: int, eps: float) -> nn.Module:
    """Build Transformer Engine's norm, to be saved as one of its linears' is: without an extra state.

    ``fused_residual_rmsnorm`` makes it return what it normed as well, as Megatron's layers expect.
    """
    norm: nn.Module = te.TENorm(config, hidden_size, eps, has_residual=True)
    # torch saves an extra state if the class has other methods for it than nn.Module, whatever the object
    # has. Which of Transformer Engine's classes it is, only TENorm knows: so the subclass that has
    # nn.Module's methods back is made here.
    plain = {name: getattr(nn.Module, name) for name in ("get_extra_state", "set_extra_state")}
    norm.__class__ = type(type(norm).__name__, (type(norm),), plain)
    return norm


def _recomputed(config: TransformerConfig) -> Collection[str]:
    return (config.recompute_modules or ()) if config.recompute_granularity == "selective" else ()


def _wants_input_norms_apart(config: TransformerConfig) -> bool:
    return "layernorm" in _recomputed(config) or config.fused_residual_rmsnorm


def _with_separate_input_norms(
    layer: TransformerLayerSubmodules, norm: Callable[..., nn.Module], why: str
) -> TransformerLayerSubmodules:
    """Take Transformer Engine's input norms out of its linears, and put ``norm`` before them."""
    changes: dict[str, Any] = {}
    keys = layer.sharded_state_dict_keys_map
    if (attention := _unfuse_input_norm(layer.self_attention, why)) is not layer.self_attention:
        changes |= {"self_attention": attention, "input_layernorm": norm}
        for linear, key in _ATTENTION_NORM_KEYS.items():
            if hasattr(get_submodules(attention), linear):
                keys = {**keys, **key}
    if (mlp := _unfuse_input_norm(layer.mlp, why)) is not layer.mlp:
        changes |= {"mlp": mlp, "pre_mlp_layernorm": norm}
        keys = {**keys, **_MLP_NORM_KEY}
    return replace(layer, **changes, sharded_state_dict_keys_map=keys)


def _with_norms_of_fp32_stream(
    layer: TransformerLayerSubmodules, config: TransformerConfig
) -> TransformerLayerSubmodules:
    """Replace Transformer Engine's input norms, in its linears and before them, by ours."""
    apart = _norms_of_stream(layer, config, "input_layernorm", "pre_mlp_layernorm")
    placed = _with_separate_input_norms(
        replace(layer, **apart), InputNorm, "fp32_residual_connection wants it by itself; drop it"
    )
    if config.fused_residual_rmsnorm and placed != layer:
        raise ValueError(
            "--fused-residual-rmsnorm: Transformer Engine's kernel takes no residual stream in fp32; drop it "
            "or --fp32-residual-connection"
        )
    return placed


def _norms_of_stream(spec: Any, config: TransformerConfig, *names: str) -> dict[str, Any]:
    """Return what stands for those norms of a spec that are Transformer Engine's, if the stream is fp32."""
    if not config.fp32_residual_connection:
        return {}
    return {name: EngineInputNorm for name in names if getattr(spec, name) in _ENGINE_NORMS}


def _with_fused_norm(
    layer: TransformerLayerSubmodules, placement: NormPlacement
) -> TransformerLayerSubmodules:
    unfused = _unfuse_input_norm(layer.mlp, "fuse_pre_mlp_norm computes that norm; do without one of the two")
    keys = layer.sharded_state_dict_keys_map
    if unfused is not layer.mlp:
        keys = {**keys, **_MLP_NORM_KEY}
    norm = _own_input_norm(placement, FusedInputNorm)
    return replace(layer, pre_mlp_layernorm=norm, mlp=unfused, sharded_state_dict_keys_map=keys)


def _unfuse_input_norm(sublayer: Any, why: str) -> Any:
    """Swap the Transformer Engine linears that normalize the residual stream for plain ones."""
    if _fuses_whole_mlp(sublayer):
        raise ValueError(
            f"--use-transformer-engine-op-fuser builds the MLP around its input norm, and {why}, or drop the "
            "flag"
        )
    try:
        submodules = get_submodules(sublayer)
    except (KeyError, ValueError):
        submodules = None
    linears = {name: getattr(submodules, name, None) for name in _STREAM_LINEARS}
    for linear in (sublayer, *linears.values()):
        name = getattr(getattr(linear, "module", linear), "__name__", "")
        if "LayerNorm" in name and linear is not te.TELayerNormColumnParallelLinear:
            raise ValueError(f"{name} normalizes its input, and {why}, or another --transformer-impl")
    fused = [name for name, linear in linears.items() if linear is te.TELayerNormColumnParallelLinear]
    if not fused:
        return sublayer
    return with_submodules(sublayer, replace(submodules, **{name: _STREAM_LINEARS[name] for name in fused}))


def _fuses_whole_mlp(sublayer: Any) -> bool:
    owner = getattr(getattr(sublayer, "func", None), "__self__", None)
    return owner is not None and owner in (te.TEFusedMLP, getattr(te, "TEFusedMLPWithGroupedLinear", None))
