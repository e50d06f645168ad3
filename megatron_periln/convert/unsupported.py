"""What of a model the targets don't support, and the choice of a target that supports all of it."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_periln.convert.architecture import Architecture
from megatron_periln.convert.experts.unsupported import unsupported_by_all_mixtures, unsupported_experts
from megatron_periln.convert.targets import TARGETS, Target
from megatron_periln.errors import UsageError

__all__ = [
    "UnsupportedFeature",
    "choose_target",
    "refuse_unsupported",
    "unsupported_by",
    "unsupported_by_all",
]


@dataclass(frozen=True)
class UnsupportedFeature:
    """Something that an exported model can't express.

    Parameters
    ----------
    reason
        What the model has, as a clause.
    change
        What to train with instead.
    """

    reason: str
    change: str


# Megatron's argument, its value in every model that can be exported, what another value means, and
# what to train with.
_REQUIRED: tuple[tuple[str, Any, str, str], ...] = (
    ("hybrid_layer_pattern", None, "it is a hybrid model", "a GPT, without --hybrid-layer-pattern"),
    ("multi_latent_attention", False, "it has multi-latent attention", "--group-query-attention"),
    ("spec", None, "its layers come from --spec", "Megatron's own layers, without --spec"),
    (
        "heterogeneous_layers_config_path",
        None,
        "its layers differ",
        "equal layers, without --heterogeneous-layers-config-path",
    ),
    ("experimental_attention_variant", None, "it has another attention", "--group-query-attention"),
    ("normalization", "RMSNorm", "its norms are LayerNorms", "--normalization RMSNorm"),
    ("swiglu", True, "its MLP is not SwiGLU", "--swiglu"),
    ("glu_linear_offset", 0.0, "its MLP adds --glu-linear-offset", "--glu-linear-offset 0"),
    ("activation_func_clamp_value", None, "its MLP is clamped", "no --activation-func-clamp-value"),
    ("softmax_type", "vanilla", "its softmax has a sink", "--softmax-type vanilla"),
    ("qk_l2_norm", False, "its queries and keys have L2 norms", "--qk-layernorm"),
)


def unsupported_by_all(args: Namespace) -> list[UnsupportedFeature]:
    """Return what no target supports of the model that Megatron's saved ``args`` describe."""
    # Megatron's fused kernel of SwiGLU does not clamp, whatever the flag says.
    unread = {"activation_func_clamp_value"} if getattr(args, "bias_swiglu_fusion", False) else set()
    found = [
        UnsupportedFeature(reason, change)
        for name, value, reason, change in _REQUIRED
        if name not in unread and getattr(args, name, value) != value
    ]
    experts = [UnsupportedFeature(*each) for each in unsupported_by_all_mixtures(args)]
    return found + experts + _unsupported_positions(args)


def _unsupported_positions(args: Namespace) -> list[UnsupportedFeature]:
    kind = getattr(args, "position_embedding_type", "rope")
    if kind not in ("rope", "yarn"):
        return [UnsupportedFeature("its positions are not rotary", "--position-embedding-type rope")]
    if kind == "yarn":
        if (args.mscale, args.mscale_all_dim) != (1.0, 0.0):
            return [UnsupportedFeature("its YaRN has --mscale or --mscale-all-dim", "neither of them")]
        return []
    interpolated = getattr(args, "rotary_seq_len_interpolation_factor", None) is not None
    if interpolated and getattr(args, "use_rope_scaling", False):
        return [
            UnsupportedFeature(
                "its rotary frequencies are scaled twice",
                "either --use-rope-scaling or --rotary-seq-len-interpolation-factor",
            )
        ]
    return []


def refuse_unsupported(args: Namespace) -> None:
    """Refuse a model of which no target supports something.

    Raises
    ------
    UsageError
        If `unsupported_by_all` finds something.
    """
    if features := unsupported_by_all(args):
        raise UsageError(f"no target can express this model: {_explain(features)}")


def unsupported_by(target: Target, architecture: Architecture) -> list[UnsupportedFeature]:
    """Return what ``target`` doesn't support of ``architecture``; nothing if it computes the same."""
    found = []
    placement, name = architecture.placement, target.name
    if placement.without_settings.label != target.placement:
        found.append(
            UnsupportedFeature(
                f"its norm placement is {placement.label} and {name}'s is {target.placement}",
                f"--norm-placement {target.placement}",
            )
        )
    found += _unsupported_epsilons(target, architecture)
    if target.qk_norm is True and not architecture.qk_norm:
        found.append(
            UnsupportedFeature(f"it has no norm of queries and keys, and {name} has", "--qk-layernorm")
        )
    if architecture.qk_norm and not target.qk_norm:
        found.append(
            UnsupportedFeature(f"it norms queries and keys, and {name} does not", "no --qk-layernorm")
        )
    found += [UnsupportedFeature(*each) for each in unsupported_experts(target, architecture.experts)]
    if architecture.kinds is not None:
        found += [UnsupportedFeature(*each) for each in architecture.kinds.unsupported_by(target)]
    if architecture.attention_gate and not target.gate:
        found.append(
            UnsupportedFeature(f"its attention is gated, and {name}'s is not", "no --attention-output-gate")
        )
    elif architecture.attention_gate and "qkv" in architecture.biases:
        found.append(
            UnsupportedFeature(
                f"the gate of its attention has a bias, and {name}'s has none", "no --add-qkv-bias"
            )
        )
    if architecture.qk_norm and target.qk_norm and architecture.whole_qk_norm != target.whole_qk_norm:
        found.append(
            UnsupportedFeature(
                f"its norms of queries and keys are over all heads together, and {name}'s of each",
                "no --whole-qk-norm",
            )
            if architecture.whole_qk_norm
            else UnsupportedFeature(
                f"its norms of queries and keys are of each head, and {name}'s over all together",
                "--whole-qk-norm",
            )
        )
    if target.embedding_norm and not placement.embedding:
        found.append(UnsupportedFeature(f"it has no embedding norm, and {name} has", "--embedding-norm"))
    if lacking := architecture.biases - target.biases:
        keep = " --add-qkv-bias" if "qkv" in architecture.biases & target.biases else ""
        found.append(
            UnsupportedFeature(
                f"it has biases ({', '.join(sorted(lacking))}) that {name} has not",
                f"--disable-bias-linear{keep}",
            )
        )
    if architecture.rope.fraction != 1 and not target.partial_rotary:
        found.append(
            UnsupportedFeature(
                f"it rotates {architecture.rope.fraction:g} of each head, and {name} all of it",
                "--rotary-percent 1.0",
            )
        )
    if target.divided_heads and architecture.hidden_size % architecture.num_heads:
        found.append(
            UnsupportedFeature(
                f"its hidden size is not divisible by its number of heads, and {name}'s is",
                "another --num-attention-heads, with the same --kv-channels",
            )
        )
    if target.layer_kinds == "rotates everywhere" and architecture.rope.scaling is not None:
        found.append(
            UnsupportedFeature(
                f"it scales rotary frequencies in all layers, and {name} in those without a window",
                "neither --use-rope-scaling nor its kin",
            )
        )
    if target.whole_heads and architecture.num_heads * architecture.head_dim != architecture.hidden_size:
        found.append(
            UnsupportedFeature(
                f"its heads are not of the hidden size together, and {name}'s are", "no --kv-channels"
            )
        )
    return found


def _unsupported_epsilons(target: Target, architecture: Architecture) -> Iterator[UnsupportedFeature]:
    """Yield which norms have an epsilon of their own; that of output norms is folded into their input.

    And the embedding's norm into the table, where the target has none.
    """
    given = architecture.placement.norms.given()
    for kind in ("input", "after_add", "final", *(["embedding"] if target.embedding_norm else [])):
        epsilon = given.get(kind, {}).get("epsilon", architecture.eps)
        if epsilon != architecture.eps:
            yield UnsupportedFeature(
                f"its {kind} norm has an epsilon of {epsilon:g}, and {target.name} has one for all norms, "
                f"{architecture.eps:g}",
                f"no epsilon for {kind} in --norm-rule",
            )


def choose_target(architecture: Architecture, name: str = "auto") -> tuple[Target, str]:
    """Return the target for ``architecture``, and why it was chosen.

    Parameters
    ----------
    architecture
        What the exported model must compute.
    name
        A key of `TARGETS`, or ``"auto"`` for the first that computes the same.

    Raises
    ------
    UsageError
        If no target, or not the named one, computes the same: with the reasons, and the nearest
        change with which it would.
    """
    if name != "auto":
        target = TARGETS[name]
        if features := unsupported_by(target, architecture):
            raise UsageError(f"this model can't be exported to {name}: {_explain(features)}")
        return target, f"asked for; runs in {target.runs_in}"
    unsupported = {each: unsupported_by(target, architecture) for each, target in TARGETS.items()}
    fitting = [each for each in TARGETS if not unsupported[each]]
    if fitting:
        target = TARGETS[fitting[0]]
        norms = ", with norms of queries and keys" if architecture.qk_norm else ""
        norms += ", with experts" if architecture.experts else ""
        others = f"; others that do: {', '.join(fitting[1:])}" if fitting[1:] else ""
        return target, (
            f"it computes {architecture.placement.name}{norms}, and runs in {target.runs_in}{others}"
        )
    label = architecture.placement.without_settings.label
    same_placement = [t.name for t in TARGETS.values() if t.placement == label]
    if not same_placement:
        raise UsageError(
            f"no target can express norm placement {architecture.placement.label}: there are those of pre, "
            "peri, output and post"
        )
    nearest = min(same_placement, key=lambda each: len(unsupported[each]))
    raise UsageError(
        f"no target can express this model. The nearest is {nearest}: {_explain(unsupported[nearest])}"
    )


def _explain(features: Sequence[UnsupportedFeature]) -> str:
    reasons = "; ".join(feature.reason for feature in features)
    changes = ", ".join(feature.change for feature in features)
    return f"{reasons}. A model trained with {changes} could be"
