"""Megatron's flags for mixtures of experts."""

from __future__ import annotations

from megatron_periln.convert.experts.architecture import Experts

__all__ = ["expert_flags"]


def expert_flags(experts: Experts | None) -> list[list[str]]:
    """Return them, each a flag and its value."""
    if experts is None:
        return []
    softmax = experts.score == "softmax"
    values = {
        "--num-experts": experts.count,
        "--moe-router-topk": experts.chosen,
        "--moe-ffn-hidden-size": experts.width,
        "--moe-router-score-function": experts.score,
        "--moe-router-topk-scaling-factor": experts.scale if experts.scale != 1 else None,
        "--moe-shared-expert-intermediate-size": experts.shared_width or None,
        "--moe-layer-freq": None if all(experts.layers) else str([int(each) for each in experts.layers]),
    }
    if experts.groups is not None:
        values |= dict(
            zip(("--moe-router-num-groups", "--moe-router-group-topk"), experts.groups, strict=True)
        )
    switches = {
        "--moe-router-pre-softmax": softmax and not experts.normalized,
        "--moe-router-enable-expert-bias": experts.bias,
        "--moe-shared-expert-gate": experts.shared_switch,
    }
    return [
        *([flag, str(value).replace(" ", "")] for flag, value in values.items() if value is not None),
        *([flag] for flag, wanted in switches.items() if wanted),
    ]
