"""The settings of mixtures of experts in a configuration of transformers, written and read."""

from __future__ import annotations

from typing import Any

from megatron_periln.convert.experts.architecture import Experts
from megatron_periln.convert.targets import Mixture
from megatron_periln.errors import UsageError

__all__ = ["expert_settings", "experts_of"]


def expert_settings(experts: Experts | None, mixture: Mixture | None) -> dict[str, Any]:
    """Return what config.json says of experts, where the target supports all of them."""
    if experts is None or mixture is None:
        return {}
    settings: dict[str, Any] = {
        mixture.count: experts.count,
        "num_experts_per_tok": experts.chosen,
        mixture.width: experts.width,
    }
    if isinstance(mixture.normalized, str):
        settings[mixture.normalized] = experts.normalized
    if mixture.groups is not None:
        settings |= dict(zip(mixture.groups, experts.groups or (1, 1), strict=True))
    if mixture.scale is not None:
        settings[mixture.scale] = experts.scale
    width = experts.shared_width or experts.width  # one of zeros where there is none
    if mixture.shared_width is not None:
        settings[mixture.shared_width] = width
    if mixture.shared_count is not None:
        settings[mixture.shared_count] = width // experts.width
    if mixture.first_dense is not None:
        settings[mixture.first_dense] = experts.first_dense
    if mixture.dense_layers is not None:
        settings[mixture.dense_layers] = experts.dense_layers
    return settings


def experts_of(config: Any, mixture: Mixture | None) -> Experts | None:
    """Return what the experts of a model of transformers compute, None if the target has none.

    Raises
    ------
    UsageError
        For what Megatron has nothing for.
    """
    if mixture is None:
        return None

    def value(name: str | None, default: Any) -> Any:
        return default if name is None else getattr(config, name)

    layers = config.num_hidden_layers
    dense = {*range(value(mixture.first_dense, 0)), *value(mixture.dense_layers, ())}
    count, width, chosen = (getattr(config, name) for name in mixture.sizes)
    if chosen > count:
        raise UsageError(f"the model has num_experts_per_tok {chosen}, and {mixture.count} {count}")
    normalized = mixture.normalized is True or bool(value(str(mixture.normalized), True))
    said = "" if mixture.normalized is True else f"{mixture.normalized} {normalized}, and "
    if normalized and chosen == 1:
        raise UsageError(
            f"the model has {said}num_experts_per_tok 1: the score of the chosen expert is always 1, and "
            "Megatron has no such router"
        )
    if mixture.score == "sigmoid" and not normalized and chosen > 1:
        raise UsageError(
            f"the model has {said}num_experts_per_tok {chosen}; Megatron always divides the sigmoids of "
            "several experts by their sum"
        )
    if dense >= set(range(layers)):
        raise UsageError("none of the model's layers has experts; it is dense")
    return Experts(
        layers=tuple(layer not in dense for layer in range(layers)),
        count=count,
        chosen=chosen,
        width=width,
        score=mixture.score,
        normalized=normalized,
        bias=mixture.bias,
        groups=_groups(config, mixture, chosen),
        scale=value(mixture.scale, 1.0),
        shared_width=value(mixture.shared_width, 0) or value(mixture.shared_count, 0) * width,
        shared_switch=mixture.shared_switch,
    )


def _groups(config: Any, mixture: Mixture, chosen: int) -> tuple[int, int] | None:
    if mixture.groups is None:
        return None
    count, limit = (getattr(config, name) or 1 for name in mixture.groups)
    if count == limit:
        return None
    if chosen // limit != 2:
        raise UsageError(
            f"the model has {mixture.groups[1]} {limit} for {chosen} experts a token; Megatron chooses "
            f"groups by the sum of their best {chosen // limit} scores, and the model of their best 2"
        )
    return count, limit
