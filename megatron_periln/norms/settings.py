"""What a norm has of its own, by its kind, as data: weights or none, its epsilon, how its weights are stored.

What is not given is the model's: ``--norm-epsilon`` and ``--apply-layernorm-1p``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

__all__ = ["MODELS", "NORM_KINDS", "NormSettings", "Norms"]


@dataclass(frozen=True, kw_only=True)
class NormSettings:
    """What the norms of one kind have of their own.

    Attributes
    ----------
    weight
        Whether they have weights, and in LayerNorm biases. Without, they have no parameters.
    epsilon
        None for the model's.
    zero_centered
        Whether their weights are stored less 1, so that weight decay draws them to 1; None for the model's.
    """

    weight: bool = True
    epsilon: float | None = None
    zero_centered: bool | None = None

    @staticmethod
    def of(given: Any) -> NormSettings:
        """Return the settings that a mapping gives.

        Raises
        ------
        ValueError
            If it is none, or a name or a value in it can't be.
        """
        names = [each.name for each in fields(NormSettings)]
        if not isinstance(given, Mapping):
            raise ValueError(f"can't be {given!r}; it has {', '.join(names)}, such as {{weight: false}}")
        if unknown := given.keys() - set(names):
            raise ValueError(f"has no {', '.join(sorted(map(str, unknown)))}; it has {', '.join(names)}")
        weight, centered = given.get("weight", True), given.get("zero_centered")
        if not isinstance(weight, bool):
            raise ValueError(f"has weight {weight!r}, which is true or false")
        if centered is not None and not isinstance(centered, bool):
            raise ValueError(f"has zero_centered {centered!r}, which is true or false")
        if not weight and centered is not None:
            raise ValueError("has no weight that zero_centered could be about; drop one of them")
        return NormSettings(weight=weight, epsilon=_epsilon(given.get("epsilon")), zero_centered=centered)

    def given(self) -> dict[str, Any]:
        """Return what `of` makes these settings of."""
        if self is MODELS:
            return {}
        return {name: value for name, value in asdict(self).items() if value != getattr(MODELS, name)}


def _epsilon(given: Any) -> float | None:
    if given is None:
        return None
    try:  # YAML takes 1e-5 for text
        epsilon = math.nan if isinstance(given, bool) else float(given)
    except (TypeError, ValueError, OverflowError):
        epsilon = math.nan
    if not 0 < epsilon < math.inf:
        raise ValueError(f"has epsilon {given!r}, which is a number above 0")
    return epsilon


MODELS = NormSettings()
"""The model's: nothing of their own."""


@dataclass(frozen=True, kw_only=True)
class Norms:
    """The settings of each kind of norm; by default the model's.

    Attributes
    ----------
    input, output, after_add
        ``N_in``, ``N_out`` and ``N_after`` of every sublayer.
    embedding, final
        The norm of the embedding, and that between the last layer and the output projection.
    """

    input: NormSettings = MODELS
    output: NormSettings = MODELS
    after_add: NormSettings = MODELS
    embedding: NormSettings = MODELS
    final: NormSettings = MODELS

    @staticmethod
    def of(given: Any) -> Norms:
        """Return the settings that a mapping of mappings gives.

        Raises
        ------
        ValueError
            If it is none, or a name or a value in it can't be.
        """
        if not isinstance(given, Mapping):
            raise ValueError(
                f"norms can't be {given!r}; they are {', '.join(NORM_KINDS)}, with settings each"
            )
        if unknown := given.keys() - set(NORM_KINDS):
            raise ValueError(
                f"there are no norms {', '.join(sorted(map(str, unknown)))}; those there are: "
                f"{', '.join(NORM_KINDS)}"
            )
        settings = {}
        for kind, of_kind in given.items():
            try:
                settings[kind] = NormSettings.of(of_kind)
            except ValueError as error:
                raise ValueError(f"norms: {kind} {error}") from error
        return Norms(**settings)

    def given(self) -> dict[str, dict[str, Any]]:
        """Return what `of` makes these settings of."""
        settings = {kind: getattr(self, kind).given() for kind in NORM_KINDS}
        return {kind: of_kind for kind, of_kind in settings.items() if of_kind}

    def beside(self, zero_centered: bool) -> Norms:
        """Return the same settings, without what is so in a model whose weights are stored so anyway."""
        kinds = {kind: getattr(self, kind) for kind in NORM_KINDS}
        same = {kind: of for kind, of in kinds.items() if of.zero_centered == zero_centered}
        return replace(self, **{kind: replace(of, zero_centered=None) for kind, of in same.items()})

    def without_epsilons(self) -> Norms:
        """Return the same settings, with the model's epsilon for all."""
        return Norms(**{kind: replace(getattr(self, kind), epsilon=None) for kind in NORM_KINDS})


NORM_KINDS = tuple(each.name for each in fields(Norms))
