"""From the command line, or a checkpoint's saved arguments, to a `NormPlacement`, and back."""

from __future__ import annotations

import json
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from megatron_periln.errors import UsageError
from megatron_periln.norms.kernels import BACKENDS, MAX_NORM_ADD_NORM_HIDDEN_SIZE
from megatron_periln.norms.placement import PLACEMENTS, NormPlacement
from megatron_periln.norms.settings import NORM_KINDS

__all__ = [
    "GROUP",
    "add_norm_arguments",
    "placement_flags",
    "placement_of",
    "read_norm_rule",
    "set_placement",
    "why_norms_stay_apart",
    "why_rule_does_not_fit",
]

GROUP = "norm placement"

# A placement's arguments, and what they are in stock Megatron, whose checkpoints have none of them.
_STOCK: dict[str, Any] = {
    "norm_placement": "pre",
    "embedding_norm": False,
    "output_norm_init": "ones",
    "freeze_output_norm": False,
    "output_norm_epsilon": None,
}

# What has other initial weights than attention and a dense MLP, as `models.initial_scale` knows them.
_OTHER_INITIAL_WEIGHTS = (
    *("num_experts", "multi_latent_attention", "spec", "experimental_attention_variant"),
    *("heterogeneous_layers_config_path", "attention_output_gate", "use_megatron_fsdp"),
    *("fp8_param_gather", "fp4_param_gather"),
)

# Flags that change one part each of the placement's rule.
_SCALES = ("residual_scale", "output_scale", "input_scale")


def add_norm_arguments(parser: ArgumentParser) -> None:
    """Add the norms' group of flags to a parser."""
    group = parser.add_argument_group(title=GROUP)
    group.add_argument(
        "--norm-placement",
        choices=tuple(PLACEMENTS),
        default="peri",
        metavar="P",
        help="pre x+M(N(x)), post N(x+M(x)), peri x+N(M(N(x))), output x+N(M(x)); "
        f"{' '.join(list(PLACEMENTS)[4:])}; default: peri",
    )
    for name, letter, what in (
        ("--residual-scale", "A", "the stream"),
        ("--output-scale", "B", "what is added"),
        ("--input-scale", "S", "input norms"),
    ):
        group.add_argument(name, metavar=letter, help=f"times {what}: a number, or a formula of layer l")
    group.add_argument("--norm-rule", metavar="FILE", help="YAML that changes the rule (docs/rules.md)")
    group.add_argument(
        "--embedding-norm",
        action=BooleanOptionalAction,
        default=None,
        help="normalize the embedding; default: for peri and output",
    )
    group.add_argument(
        "--output-norm-init",
        choices=("ones", "depth-scaled"),
        default="ones",
        metavar="W",
        help="ones, or depth-scaled (1/sqrt(layers)); default: ones",
    )
    group.add_argument(
        "--freeze-output-norm", action="store_true", help="keep output norms' weights at their start"
    )
    group.add_argument(
        "--output-norm-epsilon",
        type=float,
        metavar="E",
        default=None,
        help="default: that of --norm-epsilon",
    )
    group.add_argument("--whole-qk-norm", action="store_true", help="--qk-layernorm of all heads together")
    group.add_argument(
        "--norm-backend",
        choices=BACKENDS,
        default="auto",
        metavar="NAME",
        help="auto, triton, compile or torch; default: auto",
    )
    group.add_argument(
        "--fuse-pre-mlp-norm",
        action="store_true",
        help=f"peri: two norms as one kernel, up to hidden size {MAX_NORM_ADD_NORM_HIDDEN_SIZE}",
    )


def placement_of(args: Namespace) -> NormPlacement:
    """Return the placement that ``args`` ask for, parsed or saved; stock Megatron's ask for Pre-LN.

    Raises
    ------
    UsageError
        If they contradict each other.
    """
    name, embedding, init, freeze, epsilon = (getattr(args, name, stock) for name, stock in _STOCK.items())
    try:
        placement = (
            NormPlacement.named(name)
            .with_options(embedding=embedding)  # which the rule's norms may have settings for
            .changed(_changes(args))
            .with_options(
                embedding=embedding,
                output_norm_init=init,
                freeze_output_norm=freeze,
                output_norm_epsilon=epsilon,
            )
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    centered = getattr(args, "layernorm_zero_centered_gamma", False)
    return replace(placement, norms=placement.norms.beside(centered))


def read_norm_rule(args: Namespace) -> None:
    """Put what the file of ``--norm-rule`` says in its place, so that checkpoints remember it.

    Raises
    ------
    UsageError
        If it can't be read, or holds no mapping.
    """
    given = getattr(args, "norm_rule", None)
    if given is None or given.startswith("{"):
        return
    args.norm_rule = None
    try:
        rule = yaml.safe_load(Path(given).read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:  # of what is no text, or no date
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UsageError(f"--norm-rule {given}: cannot be read: {reason}") from error
    if not isinstance(rule, dict):
        raise UsageError(f"--norm-rule {given}: has no names with values, such as residual_scale: 0.5")
    try:
        args.norm_rule = json.dumps({str(name): value for name, value in rule.items()}, default=str)
    except (TypeError, ValueError) as error:  # a date as a name further in, a list in itself
        raise UsageError(f"--norm-rule {given}: is no mapping of names to values: {error}") from error


def _changes(args: Namespace) -> dict[str, Any]:
    """Return what arguments change of the rule of their placement."""
    text = getattr(args, "norm_rule", None)
    try:
        changes: dict[str, Any] = json.loads(text) if text else {}
    except json.JSONDecodeError as error:
        raise UsageError(f"--norm-rule {text}: is no JSON; give it, or a file of YAML") from error
    for name in _SCALES:
        if (value := getattr(args, name, None)) is None:
            continue
        if name in changes:
            raise UsageError(f"--{name.replace('_', '-')} and --norm-rule both give it; give it once")
        try:
            changes[name] = float(value)
        except ValueError:
            changes[name] = value
    return changes


def set_placement(args: Namespace, placement: NormPlacement) -> None:
    """Make ``args`` ask for ``placement``."""
    args.norm_placement = placement.name
    args.norm_rule = json.dumps(placement.changes()) if placement.changes() else None
    for name in _SCALES:
        setattr(args, name, None)
    args.embedding_norm = placement.embedding
    args.output_norm_init = placement.output_norm_init
    args.freeze_output_norm = placement.freeze_output_norm
    args.output_norm_epsilon = placement.output_norm_epsilon


def placement_flags(placement: NormPlacement) -> list[list[str]]:
    """Return the flags for a placement's rule, each with its value; not for its options."""
    embedding = "--embedding-norm" if placement.embedding else "--no-embedding-norm"
    changes = placement.changes()
    rule = [["--norm-rule", json.dumps(changes)]] if changes else []
    return [["--norm-placement", placement.name], *rule, [embedding]]


def why_rule_does_not_fit(args: Namespace, placement: NormPlacement) -> str | None:
    """Return why a placement's rule can't be that of the model that ``args`` describe, None if it can.

    Parameters
    ----------
    args
        Megatron's arguments, not yet validated.
    placement
        That of ``args``.
    """
    pattern = args.hybrid_layer_pattern or getattr(args, "hybrid_override_pattern", None)  # its former name
    hybrid, depth = bool(pattern), placement.goes_by_depth
    start = placement.initial_scale != 1.0
    other_layers = [getattr(args, name, None) for name in _OTHER_INITIAL_WEIGHTS]
    reasons = {
        "--hybrid-layer-pattern has the same norms in all layers of a symbol, none scaled; choose another": (
            hybrid and (not placement.same_norms or placement.input_scale != 1.0)
        ),
        "it goes by depth, and the layers of --mtp-num-layers are at none; choose another": (
            args.mtp_num_layers and depth
        ),
        "its initial weights are those of attention and a dense MLP, and these flags build other layers; "
        "choose another": start and (hybrid or args.mtp_num_layers or any(other_layers)),
        "--use-megatron-fsdp starts parameters by itself, not at a rule's scales; drop one of them": (
            placement.learned and getattr(args, "use_megatron_fsdp", False)
        ),
        "--init-model-with-meta-device leaves norms without weights as the memory was; drop it": (
            getattr(args, "use_megatron_fsdp", False)
            and args.init_model_with_meta_device
            and not all(getattr(placement.norms, kind).weight for kind in NORM_KINDS)
        ),
        "it norms queries and keys in the place of attention's input; give --qk-layernorm": (
            placement.name == "hybrid-norm" and not args.qk_layernorm
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            return f"--norm-placement {placement.label}: {reason}"
    if not args.num_layers or hybrid:
        return None
    try:
        placement.rules(args.num_layers)
    except ValueError as error:
        return str(error)
    return None


def why_norms_stay_apart(
    placement: NormPlacement,
    *,
    whole_layers: bool,
    recomputed: Collection[str],
    offloaded: Collection[str],
    hidden_size: int | None = None,
) -> str | None:
    """Return why attention's output norm and the MLP's input norm can't be one kernel, None if they can.

    Parameters
    ----------
    placement
        Where the norms stand.
    whole_layers
        Whether every layer has attention and an MLP.
    recomputed, offloaded
        Megatron's ``recompute_modules`` and ``offload_modules``, as far as they are in force.
    hidden_size
        None if the kernels are to see to it, of which only Triton's have a limit.
    """
    reasons = {
        f"--norm-placement {placement.name} has not both norms": not (placement.input and placement.output),
        f"--norm-placement {placement.label} has not the same norms in every layer": not placement.same_norms,
        "--input-scale is not of its kernel": placement.input_scale != 1.0,
        "zero_centered of --norm-rule is not the same for input and output norms, as in its kernel": (
            placement.norms.input.zero_centered != placement.norms.output.zero_centered
        ),
        f"--norm-placement {placement.label} learns scales, which are not of its kernel": placement.learned,
        "--hybrid-layer-pattern has no layers of attention and MLP": not whole_layers,
        "--recompute-modules layernorm recomputes that norm alone": "layernorm" in recomputed,
        "--offload-modules mlp_norm offloads that norm alone": "mlp_norm" in offloaded,
        f"--hidden-size {hidden_size} is beyond the {MAX_NORM_ADD_NORM_HIDDEN_SIZE} of its kernel": (
            hidden_size is not None and hidden_size > MAX_NORM_ADD_NORM_HIDDEN_SIZE
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            return f"--fuse-pre-mlp-norm: {reason}; drop one of them"
    return None
