"""Output norms for a trained Pre-LN model: a start that is near it, not the same model.

``x + y`` becomes ``x + w * y / rms(y)``, with one weight for each channel where ``y`` had a length of
its own at each token, which no weights undo. They are fitted in the least squares sense, so that every
sublayer adds about what it added, and then by some steps down the gradient of the loss.
"""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_periln.checkpoints.reader import Checkpoint
from megatron_periln.convert.unsupported import refuse_unsupported
from megatron_periln.errors import UsageError
from megatron_periln.evaluation.loss import Loss, mean_loss, token_windows, window_length
from megatron_periln.files import new_folder
from megatron_periln.models.one_process import (
    load_model,
    megatron_config,
    megatron_logits,
    save_model,
    single_process,
)
from megatron_periln.norms import PERI, OutputNorm
from megatron_periln.norms.arguments import placement_flags, placement_of, set_placement

__all__ = ["calibrated_output_norms", "insert_output_norms"]

_NEW = ("self_attn_bda.norm", "mlp_bda.norm")
_CALIBRATION, _EVALUATION = 16, 32  # windows of text
_STEPS, _BATCH, _RATE = 24, 4, 0.03  # of Adam; the rate is relative to the size of a norm's weights

Say = Callable[[str], None]


@contextmanager
def calibrated_output_norms(model: GPTModel) -> Iterator[None]:
    """While it lasts, a forward pass sets every output norm's weight from the sublayer output that it sees.

    The weight of channel ``c`` is ``sum(y_c * n_c) / sum(n_c ** 2)`` over all tokens, with ``n`` the
    normalized output: the least squares fit of ``w * n`` to ``y``. Later sublayers see the stream
    that the earlier ones' new norms give.
    """
    norms = [module for module in model.modules() if isinstance(module, OutputNorm)]
    hooks = [norm.register_forward_pre_hook(_calibrate) for norm in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _calibrate(norm: OutputNorm, args: tuple[Any, ...]) -> None:
    """Set a norm's weight, before its forward pass, from what it is to norm."""
    sublayer_output, sublayer_bias, *_ = args
    summed = sublayer_output if sublayer_bias is None else sublayer_output + sublayer_bias
    normed = summed * torch.rsqrt(summed.square().mean(-1, keepdim=True) + norm.eps)
    tokens = tuple(range(summed.dim() - 1))
    weight = (summed * normed).sum(tokens) / normed.square().sum(tokens).clamp_min(1e-12)
    norm.weight.copy_(weight - 1 if norm.zero_centered_gamma else weight)


def insert_output_norms(
    load: Path,
    output: Path,
    prefix: str,
    length: int | None = None,
    step: int | None = None,
    say: Say = print,
) -> tuple[Loss, Loss]:
    """Make a Peri-LN checkpoint of a Pre-LN one, and return the loss before and after.

    Parameters
    ----------
    load, step
        The Pre-LN checkpoint.
    output
        The folder to write, for ``--load``.
    prefix
        An indexed dataset: its start calibrates the weights, what follows measures the loss.
    length
        Tokens of a window; None for the model's own.
    say
        Receives one line for each thing worth knowing.

    Raises
    ------
    UsageError
        If the checkpoint is not Pre-LN, or has no use of RMSNorm, or the dataset is too short or another
        model's.
    """
    checkpoint = Checkpoint(load, step)
    refuse_unsupported(checkpoint.args)
    placement = placement_of(checkpoint.args)
    if placement.label != "pre":
        raise UsageError(
            f"--load {load} has norm placement {placement.structure()}; only pre can be given norms"
        )
    args = _with_output_norms(checkpoint.args)
    config = megatron_config(checkpoint.args)
    length = window_length(length, config.seq_length)
    calibration, evaluation = (
        torch.stack(list(token_windows(prefix, length, config.vocab_size, count, skip)))
        for count, skip in ((_CALIBRATION, 0), (_EVALUATION, _CALIBRATION))
    )
    with new_folder(output, flag="--output") as folder, single_process():
        before = _loss(load_model(checkpoint.path, config), evaluation)
        model = load_model(checkpoint.path, megatron_config(args), absent=_NEW)
        say(f"Loss of the Pre-LN model: {before}")
        say(f"With output norms of weight 1: {_loss(model, evaluation)}")
        tokens = calibration[:, :-1]
        with torch.no_grad(), calibrated_output_norms(model):
            model(tokens, torch.arange(length).expand_as(tokens), None)
        say(f"With weights fitted by least squares: {_loss(model, evaluation)}")
        _descend(model, calibration)
        after = _loss(model, evaluation)
        say(f"With calibrated weights: {after}")
        save_model(folder, args, model.to(checkpoint.dtype))
    say(
        "Warning: this is another model, not a conversion; its activations have other sizes: warm the "
        "learning rate up anew"
    )
    flags = " ".join(word for flag in placement_flags(placement_of(args)) for word in flag)
    say(f"Wrote {output}. Go on with {flags} --load {output}")
    return before, after


def _descend(model: GPTModel, windows: Tensor) -> None:
    """Take some steps of Adam down the loss of ``windows``, with the output norms' weights alone."""
    weights = [module.weight for module in model.modules() if isinstance(module, OutputNorm)]
    model.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    sizes = [weight.detach().square().mean().sqrt().item() for weight in weights]
    groups = [{"params": [weight], "lr": _RATE * size} for weight, size in zip(weights, sizes, strict=True)]
    optimizer = torch.optim.Adam(groups)
    for step in range(_STEPS):
        rows = windows.roll(-step * _BATCH, 0)[:_BATCH]
        tokens, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        optimizer.zero_grad()
        model(tokens, torch.arange(tokens.size(1)).expand_as(tokens), None, labels=labels).mean().backward()
        optimizer.step()


def _with_output_norms(args: Namespace) -> Namespace:
    inserted = copy.copy(args)
    set_placement(inserted, PERI.with_options(embedding=placement_of(args).embedding))
    inserted.consumed_train_samples = inserted.skipped_train_samples = inserted.consumed_valid_samples = 0
    return inserted


def _loss(model: GPTModel, windows: Tensor) -> Loss:
    return mean_loss(lambda tokens: megatron_logits(model, tokens), iter(windows))
