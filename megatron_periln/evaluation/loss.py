"""The loss of a model on the text of an indexed dataset."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch import Tensor

from megatron_periln.errors import UsageError

__all__ = ["Loss", "mean_loss", "token_windows", "window_length"]

LogitsOf = Callable[[Tensor], Tensor]

_LONGEST = 4096


@dataclass(frozen=True)
class Loss:
    """The mean loss over some tokens.

    Parameters
    ----------
    nats
        Cross entropy per token.
    tokens
        How many were predicted.
    """

    nats: float
    tokens: int

    def __str__(self) -> str:
        return f"{self.nats:.6f} nats per token, perplexity {math.exp(self.nats):.4g}, {self.tokens:,} tokens"


def window_length(asked: int | None, max_positions: int) -> int:
    """Return the tokens of a window: as asked, or the model's longest sequence up to 4096."""
    return asked or min(max_positions, _LONGEST)


def token_windows(
    prefix: str, length: int, vocab_size: int, count: int | None = None, skip: int = 0
) -> Iterator[Tensor]:
    """Yield windows ``[length + 1]`` of a dataset's tokens: its documents in order, one after the other.

    Neighbours share one token, so that every token but the first is predicted once. What doesn't
    fill a window at the end is skipped.

    Parameters
    ----------
    prefix
        The dataset's path without ``.bin`` or ``.idx``.
    length
        Tokens to predict in each window.
    vocab_size
        Of the model that is to read them.
    count
        The most windows; None for all.
    skip
        Windows to skip at the start.

    Raises
    ------
    UsageError
        If the dataset is too short for the first of them, or has an id that the model has not.
    """
    dataset = IndexedDataset(prefix)
    pending, first, last = np.empty(0, dtype=np.int64), skip, None if count is None else skip + count
    number = 0
    for index in range(len(dataset)):
        pending = np.concatenate([pending, dataset[index].astype(np.int64)])
        while len(pending) > length:
            if last is not None and number >= last:
                return
            if number >= first:
                yield _known(torch.from_numpy(pending[: length + 1].copy()), prefix, vocab_size)
            pending = pending[length:]
            number += 1
    if number <= first:
        raise UsageError(
            f"{prefix} has tokens for {number} windows of {length}, and {first + 1} are needed; give a "
            "larger dataset, or a smaller --seq-length"
        )


def _known(window: Tensor, prefix: str, vocab_size: int) -> Tensor:
    largest = int(window.max())
    if largest >= vocab_size:
        raise UsageError(
            f"{prefix} has the token id {largest}, and the model's vocabulary has {vocab_size}; give a "
            "dataset that the model's own tokenizer made"
        )
    return window


def mean_loss(logits_of: LogitsOf, windows: Iterator[Tensor], batch: int = 4) -> Loss:
    """Return the mean loss of a model over windows, in fp32.

    Parameters
    ----------
    logits_of
        Returns logits ``[batch, sequence, vocabulary]`` of tokens ``[batch, sequence]``.
    windows
        As `token_windows` yields them.
    batch
        How many to run at a time.
    """
    total, tokens = 0.0, 0
    for rows in _batches(windows, batch):
        logits = logits_of(rows[:, :-1]).float()
        losses = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
        total += losses.double().sum().item()
        tokens += losses.numel()
    return Loss(total / tokens, tokens)


def _batches(windows: Iterator[Tensor], batch: int) -> Iterator[Tensor]:
    rows: list[Tensor] = []
    for window in windows:
        rows.append(window)
        if len(rows) == batch:
            yield torch.stack(rows)
            rows = []
    if rows:
        yield torch.stack(rows)
