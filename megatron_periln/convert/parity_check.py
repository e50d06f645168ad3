"""The parity check of a conversion: Megatron's model and transformers' give the same logits, in fp32."""

from __future__ import annotations

import gc
import math
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_periln.convert.logits import transformers_model
from megatron_periln.convert.safetensors_folder import Tensors
from megatron_periln.errors import UsageError
from megatron_periln.models.one_process import (
    load_model,
    megatron_config,
    megatron_logits,
    single_process,
)

__all__ = [
    "TOLERANCE",
    "Difference",
    "checkpoint_logits",
    "compare_logits",
    "require_parity",
    "require_rounded",
    "sample_tokens",
    "transformers_logits",
]

TOLERANCE = 1e-4
"""How far two logits may be apart in fp32; rounding alone keeps them within about 1e-5."""

_BATCH, _SEQUENCE = 2, 64


@dataclass(frozen=True)
class Difference:
    """How far two models' logits are apart.

    Parameters
    ----------
    maximum
        The largest absolute difference.
    scale
        The standard deviation of the logits compared with.
    agreement
        The share of positions at which the most probable token is the same.
    """

    maximum: float
    scale: float
    agreement: float

    def __str__(self) -> str:
        return (
            f"{self.maximum:.2g} (their standard deviation is {self.scale:.2g}; the most probable token is "
            f"the same at {self.agreement:.1%} of positions)"
        )


def sample_tokens(vocab_size: int, max_positions: int) -> Tensor:
    """Return the tokens to compare models on, ``[2, 64]`` at most: random, and always the same."""
    generator = torch.Generator().manual_seed(20250)
    return torch.randint(vocab_size, (_BATCH, min(_SEQUENCE, max_positions)), generator=generator)


def compare_logits(actual: Tensor, expected: Tensor) -> Difference:
    """Compare logits of the same shape; NaN counts as infinitely far."""
    apart = (actual.double() - expected.double()).abs().max().item()
    same = (actual.argmax(-1) == expected.argmax(-1)).double().mean().item()
    return Difference(math.inf if math.isnan(apart) else apart, expected.double().std().item(), same)


def checkpoint_logits(path: Path, args: Namespace, tokens: Tensor) -> Tensor:
    """Return the logits of Megatron's own model, loaded from a checkpoint in fp32.

    Parameters
    ----------
    path
        The checkpoint's folder, of one iteration.
    args
        Megatron's arguments, saved with it.
    tokens
        ``[batch, sequence]``.
    """
    with single_process():
        model = load_model(path, megatron_config(args))
        logits = megatron_logits(model, tokens)
    del model
    gc.collect()  # its modules refer to each other; the other model needs the memory now
    return logits


def transformers_logits(folder: Path, tokens: Tensor) -> Tensor:
    """Return the logits of a model of transformers, loaded in fp32 by `load_transformers`."""
    with transformers_model(folder) as model:
        return model.logits(tokens)


def require_parity(difference: Difference, say: Callable[[str], None]) -> None:
    """Say how far two models' logits are apart, and refuse what rounding in fp32 does not explain.

    Raises
    ------
    UsageError
        If they are further apart than `TOLERANCE`.
    """
    say(f"Parity check: largest difference of the logits in fp32: {difference}")
    if not difference.maximum <= TOLERANCE:
        raise UsageError(
            f"the two models' logits differ by {difference}, and {TOLERANCE:g} is allowed: nothing was "
            "written; please report this with the model's flags"
        )


def require_rounded(rounded: Path, exact: Path, dtype: torch.dtype) -> None:
    """Check that one folder of safetensors holds those of another, rounded to ``dtype``.

    Raises
    ------
    UsageError
        Naming the first that it does not.
    """
    theirs, ours = Tensors(exact), Tensors(rounded)
    for name in theirs:
        if not torch.equal(ours[name], theirs[name].to(dtype)):
            raise UsageError(f"{name} was not written as it was computed; nothing was written")
