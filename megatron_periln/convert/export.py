"""Exporting a checkpoint to a model of transformers."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_periln.checkpoints.reader import Checkpoint
from megatron_periln.convert import parity_check as proof
from megatron_periln.convert.architecture import Architecture, obstacles
from megatron_periln.convert.choice import choose, refuse
from megatron_periln.convert.hf_config import SpecialTokens, generation_config, model_config
from megatron_periln.convert.safetensors_folder import write_tensors
from megatron_periln.convert.targets import Target
from megatron_periln.convert.tensors import exported_tensors
from megatron_periln.convert.tokenizer_files import copy_tokenizer
from megatron_periln.files import new_folder
from megatron_periln.models.one_process import megatron_config

__all__ = ["ExportOptions", "export"]

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How to export.

    Parameters
    ----------
    target
        A key of ``TARGETS``, or ``"auto"``.
    dtype
        Of the exported tensors; None for that of the checkpoint's.
    tokenizer
        A folder with the tokenizer's files; None for that of the checkpoint's arguments.
    shard_bytes
        The most that a safetensors file holds.
    verify
        Compare the logits of both models before anything is published.
    """

    target: str = "auto"
    dtype: torch.dtype | None = None
    tokenizer: Path | None = None
    shard_bytes: int = 1 << 30
    verify: bool = True


def export(
    load: Path, output: Path, options: ExportOptions, step: int | None = None, say: Say = print
) -> None:
    """Export a checkpoint, and prove the result before it appears.

    Parameters
    ----------
    load, step
        The checkpoint: what ``--load`` and ``--ckpt-step`` take.
    output
        The folder to write.
    options
        How.
    say
        Receives one line for each thing worth knowing.

    Raises
    ------
    UsageError
        If the checkpoint can't be read or expressed, or the proof fails; ``output`` is then not there.
    """
    checkpoint = Checkpoint(load, step)
    refuse(obstacles(checkpoint.args))
    architecture = Architecture.of(megatron_config(checkpoint.args))
    target, why = choose(architecture, options.target)
    dtype = options.dtype or checkpoint.dtype
    say(f"Target {target.name} ({target.architecture}): {why}")
    if getattr(checkpoint.args, "mtp_num_layers", None):
        say("The layers of multi-token prediction are left out: the target has none")
    with new_folder(output, flag="--output") as folder:
        tokens, line = copy_tokenizer(checkpoint.args, options.tokenizer, folder)
        say(f"Tokenizer: {line}")
        size = _write(folder, checkpoint, architecture, target, tokens, dtype, options.shard_bytes)
        say(f"Weights: {size:,} bytes in {str(dtype).removeprefix('torch.')}")
        if options.verify:
            _prove(folder, checkpoint, architecture, target, tokens, dtype, say)
        else:
            say("The logits were not compared (--no-verify)")
    say(f"Wrote {output}")


def _write(
    folder: Path,
    checkpoint: Checkpoint,
    architecture: Architecture,
    target: Target,
    tokens: SpecialTokens,
    dtype: torch.dtype,
    shard_bytes: int,
) -> int:
    configs = {
        "config.json": model_config(architecture, target, tokens, dtype),
        "generation_config.json": generation_config(tokens),
    }
    for name, content in configs.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    return write_tensors(folder, exported_tensors(checkpoint.read, architecture, target, dtype), shard_bytes)


def _prove(
    folder: Path,
    checkpoint: Checkpoint,
    architecture: Architecture,
    target: Target,
    tokens: SpecialTokens,
    dtype: torch.dtype,
    say: Say,
) -> None:
    """Compare the logits in fp32, and what was rounded with what was not."""
    sample = proof.sample_tokens(architecture.vocab_size, architecture.max_positions)
    expected = proof.logits_of_checkpoint(checkpoint.path, checkpoint.args, sample)
    written = proof.compare(proof.exported_logits(folder, sample), expected)
    if dtype is torch.float32 or written.maximum <= proof.TOLERANCE:
        say(f"Proof: largest difference of the logits in fp32: {written}")
        proof.refuse_other_logits(written)
        return
    with tempfile.TemporaryDirectory(dir=folder) as exact:
        _write(Path(exact), checkpoint, architecture, target, tokens, torch.float32, 1 << 32)
        difference = proof.compare(proof.exported_logits(Path(exact), sample), expected)
        say(f"Proof: largest difference of the logits in fp32: {difference}")
        proof.refuse_other_logits(difference)
        proof.refuse_other_tensors(folder, Path(exact), dtype)
    say(f"Rounding to {str(dtype).removeprefix('torch.')} changes the logits by up to {written}")
