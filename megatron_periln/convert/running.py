"""Models as functions from tokens to logits, in fp32 on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_periln.convert.checkpoint import Checkpoint
from megatron_periln.convert.one_process import load_model, megatron_config, megatron_logits, single_process
from megatron_periln.errors import UsageError

__all__ = ["checkpoint_logits", "load_transformers", "transformers_logits"]

LogitsOf = Callable[[Tensor], Tensor]


@contextmanager
def checkpoint_logits(load: Path, step: int | None = None) -> Iterator[LogitsOf]:
    """Yield the function of a checkpoint's model.

    Raises
    ------
    UsageError
        If the checkpoint can't be read, or is a hybrid model's.
    """
    checkpoint = Checkpoint(load, step)
    if getattr(checkpoint.args, "hybrid_layer_pattern", None) is not None:
        raise UsageError(f"--load {load} is a hybrid model, which is not evaluated here")
    with single_process():
        model = load_model(checkpoint.path, megatron_config(checkpoint.args))
        yield lambda tokens: megatron_logits(model, tokens)


@contextmanager
def transformers_logits(folder: Path) -> Iterator[LogitsOf]:
    """Yield the function of a model of transformers.

    Raises
    ------
    UsageError
        If transformers can't load it.
    """
    model = load_transformers(folder)

    def logits(tokens: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(tokens).logits

    yield logits


def load_transformers(folder: Path) -> Any:
    """Load a model in fp32; its code comes from transformers.

    Raises
    ------
    UsageError
        If transformers can't load it, or not every tensor finds its place.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if not (folder / "config.json").is_file():
        raise UsageError(f"--model {folder} holds no config.json; give an exported model's folder")
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"transformers can't load {folder}: {reason}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, report[kind])):
            raise UsageError(f"{folder}: {kind.replace('_', ' ')} in transformers: {', '.join(names[:5])}")
    return model.eval()
