"""Choosing the target of an export, and saying why, or why there is none."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_periln.convert.architecture import Architecture, Misfit
from megatron_periln.convert.targets import TARGETS, Target
from megatron_periln.errors import UsageError

__all__ = ["choose", "misfits", "refuse"]


def misfits(architecture: Architecture, target: Target) -> list[Misfit]:
    """Return what ``target`` can't express of ``architecture``; nothing if it computes the same."""
    found = []
    placement, name = architecture.placement, target.name
    if placement.name != target.placement:
        found.append(
            Misfit(
                f"its norm placement is {placement.name} and {name}'s is {target.placement}",
                f"--norm-placement {target.placement}",
            )
        )
    if target.qk_norm and not architecture.qk_norm:
        found.append(Misfit(f"it has no norm of queries and keys, and {name} has", "--qk-layernorm"))
    if architecture.qk_norm and not target.qk_norm:
        found.append(Misfit(f"it norms queries and keys, and {name} does not", "no --qk-layernorm"))
    if target.embedding_norm and not placement.embedding:
        found.append(Misfit(f"it has no embedding norm, and {name} has", "--embedding-norm"))
    if lacking := architecture.biases - target.biases:
        keep = " --add-qkv-bias" if "qkv" in architecture.biases & target.biases else ""
        found.append(
            Misfit(
                f"it has biases ({', '.join(sorted(lacking))}) that {name} has not",
                f"--disable-bias-linear{keep}",
            )
        )
    if architecture.rope.fraction != 1 and not target.partial_rotary:
        found.append(
            Misfit(
                f"it rotates {architecture.rope.fraction:g} of each head, and {name} all of it",
                "--rotary-percent 1.0",
            )
        )
    if target.divided_heads and architecture.hidden_size % architecture.num_heads:
        found.append(
            Misfit(
                f"its hidden size is not divisible by its number of heads, and {name}'s is",
                "another --num-attention-heads, with the same --kv-channels",
            )
        )
    return found


def choose(architecture: Architecture, name: str = "auto") -> tuple[Target, str]:
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
        if found := misfits(architecture, target):
            raise UsageError(f"this model can't be exported to {name}: {_explain(found)}")
        return target, f"asked for; runs in {target.runs_in}"
    lacking = {each: misfits(architecture, target) for each, target in TARGETS.items()}
    fitting = [each for each in TARGETS if not lacking[each]]
    if fitting:
        target = TARGETS[fitting[0]]
        norms = ", with norms of queries and keys" if architecture.qk_norm else ""
        others = f"; others that do: {', '.join(fitting[1:])}" if fitting[1:] else ""
        return target, (
            f"it computes {architecture.placement.name}{norms}, and runs in {target.runs_in}{others}"
        )
    same_placement = [t.name for t in TARGETS.values() if t.placement == architecture.placement.name]
    nearest = min(same_placement, key=lambda each: len(lacking[each]))
    raise UsageError(
        f"no target can express this model. The nearest is {nearest}: {_explain(lacking[nearest])}"
    )


def refuse(found: Sequence[Misfit]) -> None:
    """Refuse a model of which no target can express something.

    Raises
    ------
    UsageError
        If ``found`` is not empty.
    """
    if found:
        raise UsageError(f"no target can express this model: {_explain(found)}")


def _explain(found: Sequence[Misfit]) -> str:
    reasons = "; ".join(misfit.reason for misfit in found)
    changes = ", ".join(misfit.change for misfit in found)
    return f"{reasons}. A model trained with {changes} could be"
