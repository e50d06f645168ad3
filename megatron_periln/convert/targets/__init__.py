"""The architectures of transformers that a model can be exported to, as data: each is one value."""

from __future__ import annotations

from megatron_periln.convert.targets.dense import DENSE
from megatron_periln.convert.targets.mixtures import MIXTURES
from megatron_periln.convert.targets.others import OTHERS
from megatron_periln.convert.targets.target import Mixture, Target

__all__ = ["OTHERS", "TARGETS", "Mixture", "Target"]

TARGETS: dict[str, Target] = {target.name: target for target in (*DENSE, *MIXTURES)}
"""By name, the first of several that fit being the one to choose."""
