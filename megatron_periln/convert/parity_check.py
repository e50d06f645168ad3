"""The parity check of a conversion: Megatron's model and transformers' give the same logits, in fp32."""

from __future__ import annotations

import gc
import math
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_periln.convert.logits import load_transformers
from megatron_periln.convert.safetensors_folder import Tensors
from megatron_periln.errors import UsageError
from megatron_periln.models.one_process import (
    inverse_frequencies,
    load_model,
    megatron_config,
    megatron_logits,
    single_process,
)

__all__ = [
    "FAR_TOLERANCE",
    "FREQUENCY_TOLERANCE",
    "TOLERANCE",
    "Difference",
    "Outputs",
    "checkpoint_outputs",
    "compare",
    "compare_logits",
    "megatron_outputs",
    "require_parity",
    "require_rounded",
    "sample_tokens",
    "transformers_outputs",
]

TOLERANCE = 1e-4
"""How far two logits may be apart in fp32; rounding alone keeps them within about 1e-5."""

FAR_TOLERANCE = 1e-2
"""The same at far positions, to which the last bit of a frequency turns a pair by 5e-4 radians."""

FREQUENCY_TOLERANCE = 1e-6
"""How far two inverse frequencies may be apart, relative to them; rounding keeps them within about 1e-7."""

_BATCH, _SEQUENCE = 2, 64
_STRIDE = 128
"""Between the positions of the far logits: to 8064, the sequence from which on Llama 3.1 scales."""


@dataclass(frozen=True)
class Outputs:
    """What two models must have in common.

    Parameters
    ----------
    logits
        ``[batch, sequence, vocabulary]``, of tokens at positions 0, 1, 2 and so on.
    far_logits
        Of the same tokens, `_STRIDE` positions apart, where one scaling of rotary embeddings differs from
        another.
    frequencies
        Radians by which each rotary pair turns from one position to the next.
    """

    logits: Tensor
    far_logits: Tensor
    frequencies: Tensor

    def of_ids(self, count: int) -> Outputs:
        """Return them without the logits of ids from ``count`` on, which pad the vocabulary."""
        return replace(self, logits=self.logits[..., :count], far_logits=self.far_logits[..., :count])


@dataclass(frozen=True)
class Difference:
    """How far two models are apart.

    Parameters
    ----------
    maximum
        The largest absolute difference of their logits.
    scale
        The standard deviation of the logits compared with.
    agreement
        The share of positions at which the most probable token is the same.
    far
        The largest absolute difference at far positions.
    frequencies
        The largest difference of rotary frequencies, relative to them.
    """

    maximum: float
    scale: float
    agreement: float
    far: float = 0.0
    frequencies: float = 0.0

    @property
    def excess(self) -> str | None:
        """What rounding in fp32 does not explain of it, None if it explains all."""
        if not self.maximum <= TOLERANCE:
            return f"logits differ by {self}, and {TOLERANCE:g} is allowed"
        if not self.frequencies <= FREQUENCY_TOLERANCE:
            return (
                f"rotary frequencies differ by {self.frequencies:.2g} of them, and "
                f"{FREQUENCY_TOLERANCE:g} is allowed"
            )
        if not self.far <= FAR_TOLERANCE:
            return f"logits differ by {self.far:.2g} at far positions, and {FAR_TOLERANCE:g} is allowed"
        return None

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


def compare(actual: Outputs, expected: Outputs) -> Difference:
    """Compare the logits of two models, near and far, and their rotary frequencies."""
    return replace(
        compare_logits(actual.logits, expected.logits),
        far=compare_logits(actual.far_logits, expected.far_logits).maximum,
        frequencies=_compare_frequencies(actual.frequencies, expected.frequencies),
    )


def _compare_frequencies(actual: Tensor, expected: Tensor) -> float:
    each = min(len(actual), len(expected))
    if not each:  # of a model that rotates nothing
        return 0.0 if len(actual) == len(expected) else math.inf
    if len(actual) % each or len(expected) % each:
        return math.inf
    # Transformers has those of layers with and without a window apart; they must be the same.
    actual, expected = (frequencies.reshape(-1, each) for frequencies in (actual, expected))
    apart = ((actual.double() - expected.double()).abs() / expected.double().abs()).max().item()
    return math.inf if math.isnan(apart) else apart


def _far_positions(tokens: Tensor) -> Tensor:
    return torch.arange(tokens.size(1)) * _STRIDE


def checkpoint_outputs(path: Path, args: Namespace, tokens: Tensor) -> Outputs:
    """Return the outputs of Megatron's own model, loaded from a checkpoint in fp32.

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
        outputs = megatron_outputs(model, tokens)
    del model
    gc.collect()  # its modules refer to each other; the other model needs the memory now
    return outputs


def megatron_outputs(model: GPTModel, tokens: Tensor) -> Outputs:
    """Return the outputs of a model of Megatron's, built by `build_model` in fp32."""
    return Outputs(
        logits=megatron_logits(model, tokens),
        far_logits=megatron_logits(model, tokens, _far_positions(tokens)),
        frequencies=inverse_frequencies(model),
    )


def transformers_outputs(folder: Path, tokens: Tensor) -> Outputs:
    """Return the outputs of a model of transformers, loaded in fp32 by `load_transformers`."""
    model = load_transformers(folder)
    # With a mask, as transformers takes gaps between positions for the ends of packed sequences without one.
    far = {
        "position_ids": _far_positions(tokens).expand_as(tokens),
        "attention_mask": torch.ones_like(tokens),
    }
    with torch.inference_mode():
        return Outputs(
            logits=model(tokens).logits,
            far_logits=model(tokens, **far).logits,
            frequencies=_transformers_frequencies(model),
        )


def _transformers_frequencies(model: Any) -> Tensor:
    """Return the inverse frequencies of all layers that have their own, one after the other."""
    buffers = [
        buffer
        for name, buffer in model.named_buffers()
        if name.endswith("inv_freq") and "original" not in name
    ]
    return torch.cat(buffers)


def require_parity(difference: Difference, say: Callable[[str], None]) -> None:
    """Say how far two models' logits are apart, and refuse what rounding in fp32 does not explain.

    Raises
    ------
    UsageError
        If they are further apart than `TOLERANCE`, or `FAR_TOLERANCE`, or the frequencies than
        `FREQUENCY_TOLERANCE`.
    """
    say(
        f"Parity check: largest difference of the logits in fp32: {difference}; at positions {_STRIDE} "
        f"apart: {difference.far:.2g}; of the rotary frequencies: {difference.frequencies:.2g} of them"
    )
    if difference.excess is not None:
        raise UsageError(
            f"the two models' {difference.excess}: nothing was written; please report this with the model's "
            "flags"
        )


def require_rounded(rounded: Path, exact: Path, dtype: torch.dtype) -> None:
    """Check that one folder of safetensors holds those of another, rounded to ``dtype`` or kept in fp32.

    Raises
    ------
    UsageError
        Naming the first that it does not.
    """
    theirs, ours = Tensors(exact), Tensors(rounded)
    for name in theirs:
        written = ours[name]
        if written.dtype not in (dtype, torch.float32) or not written.equal(theirs[name].to(written.dtype)):
            raise UsageError(f"{name} was not written as it was computed; nothing was written")
