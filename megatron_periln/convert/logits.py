"""Models as functions from tokens to logits, in fp32 on the CPU: of a checkpoint, and of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_periln.checkpoints.reader import Checkpoint
from megatron_periln.convert.model_folder import check_model_folder
from megatron_periln.errors import UsageError, with_kind
from megatron_periln.models.one_process import load_model, megatron_config, megatron_logits, single_process

__all__ = ["LogitsModel", "checkpoint_model", "load_transformers", "transformers_model"]


_POSITIONS = 4096  # of a model that has no longest sequence


@dataclass(frozen=True)
class LogitsModel:
    """A model as a function from tokens to logits.

    Parameters
    ----------
    logits
        Returns logits ``[batch, sequence, vocabulary]`` of tokens ``[batch, sequence]``.
    vocab_size
        Its token ids are below this.
    max_positions
        Tokens of its longest sequence.
    """

    logits: Callable[[Tensor], Tensor]
    vocab_size: int
    max_positions: int


@contextmanager
def checkpoint_model(load: Path, step: int | None = None) -> Iterator[LogitsModel]:
    """Yield a checkpoint's model.

    Raises
    ------
    UsageError
        If the checkpoint can't be read, or one process would not compute it as training did.
    """
    checkpoint = Checkpoint(load, step)
    try:
        config = megatron_config(checkpoint.args)
    except UsageError as error:
        raise UsageError(f"--load {load}: {error}") from error
    with single_process():
        model = load_model(checkpoint.path, config)
        yield LogitsModel(lambda tokens: megatron_logits(model, tokens), config.vocab_size, config.seq_length)


@contextmanager
def transformers_model(folder: Path) -> Iterator[LogitsModel]:
    """Yield a model of transformers.

    Raises
    ------
    UsageError
        If transformers can't load it.
    """
    model = load_transformers(folder)

    def logits(tokens: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(tokens).logits

    positions = getattr(model.config.get_text_config(), "max_position_embeddings", _POSITIONS)
    yield LogitsModel(logits, model.get_input_embeddings().num_embeddings, positions)


def load_transformers(folder: Path) -> Any:
    """Load a model in fp32; its code comes from transformers.

    Raises
    ------
    UsageError
        If transformers can't load it, or not every tensor finds its place.
    """
    check_model_folder(folder)
    # Not above: a checkpoint's model, and an export that is not checked, do without these seconds.
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # each architecture's own code, which fails in its own ways
        raise UsageError(f"transformers can't load {folder}: {with_kind(error, 300)}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, report[kind])):
            raise UsageError(f"{folder}: {kind.replace('_', ' ')} in transformers: {', '.join(names[:5])}")
    return model.eval()
