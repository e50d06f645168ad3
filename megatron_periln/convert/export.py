"""Exporting a checkpoint to a model of transformers."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_periln.checkpoints.reader import Checkpoint
from megatron_periln.convert import parity_check
from megatron_periln.convert.architecture import Architecture
from megatron_periln.convert.hf_config import generation_config, model_config
from megatron_periln.convert.model_folder import SpecialTokens
from megatron_periln.convert.safetensors_folder import dtype_name, is_finite, write_tensors
from megatron_periln.convert.targets import Target
from megatron_periln.convert.tokens.texts import data_prefixes
from megatron_periln.convert.tokens.write import prepare_tokenizer
from megatron_periln.convert.unsupported import choose_target, refuse_unsupported
from megatron_periln.convert.weights import exported_tensors
from megatron_periln.errors import UsageError
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
        A folder with the tokenizer's files, or its model file; None for that of the checkpoint's arguments.
    with_tokenizer
        Write the tokenizer's files.
    data
        Prefixes of indexed datasets that its ids are compared on; None for those of the checkpoint's
        arguments that are here.
    shard_bytes
        The most that a safetensors file holds.
    verify
        Compare the logits of both models before the folder gets its name.
    """

    target: str = "auto"
    dtype: torch.dtype | None = None
    tokenizer: Path | None = None
    with_tokenizer: bool = True
    data: list[str] | None = None
    shard_bytes: int = 1 << 30
    verify: bool = True


def export(
    load: Path, output: Path, options: ExportOptions, step: int | None = None, say: Say = print
) -> None:
    """Export a checkpoint, and check the result's parity before it appears.

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
        If the checkpoint can't be read or expressed, or the parity check fails; ``output`` is then not there.
    """
    checkpoint = Checkpoint(load, step)
    refuse_unsupported(checkpoint.args)
    architecture = Architecture.of(megatron_config(checkpoint.args))
    if unpadded := getattr(checkpoint.args, "unpadded_vocab_size", None):
        say(f"The vocabulary of {architecture.vocab_size:,} is cut to the {unpadded:,} of the imported model")
        architecture = replace(architecture, vocab_size=unpadded)
    target, why = choose_target(architecture, options.target)
    dtype = options.dtype or checkpoint.dtype
    say(f"Target {target.name} ({target.architecture}): {why}")
    if getattr(checkpoint.args, "mtp_num_layers", None):
        say("The layers of multi-token prediction are left out: the target has none")
    prefixes = data_prefixes(options.data, getattr(checkpoint.args, "data_path", None))
    with new_folder(output, flag="--output") as folder:
        tokenizer = prepare_tokenizer(checkpoint.args, options.tokenizer, wanted=options.with_tokenizer)
        conversion = _Conversion(checkpoint, architecture, target, tokenizer.tokens)
        conversion.write_configuration(folder, dtype)
        line = tokenizer.write(folder, architecture.vocab_size, architecture.max_positions, prefixes)
        say(f"Tokenizer: {line}")
        if tokenizer.source and "llama.cpp" in target.runs_in:
            say("For llama.cpp, use tools/export_gguf.py: its own converter doesn't know own tokenizers")
        size = conversion.write_weights(folder, dtype, options.shard_bytes)
        say(f"Weights: {size:,} bytes in {dtype_name(dtype)}")
        if options.verify:
            conversion.check_parity(folder, dtype, say)
        else:
            say("The logits were not compared (--no-verify)")
    say(f"Wrote {output}")


@dataclass(frozen=True)
class _Conversion:
    """What is exported, and as what."""

    checkpoint: Checkpoint
    architecture: Architecture
    target: Target
    tokens: SpecialTokens

    def write_configuration(self, folder: Path, dtype: torch.dtype) -> None:
        """Write config.json and generation_config.json."""
        configs = {
            "config.json": model_config(self.architecture, self.target, self.tokens, dtype),
            "generation_config.json": generation_config(self.tokens),
        }
        for name, content in configs.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")

    def write_weights(self, folder: Path, dtype: torch.dtype, shard_bytes: int) -> int:
        """Write the weights, and return the number of their bytes."""
        tensors = exported_tensors(self.checkpoint.read, self.architecture, self.target, dtype)
        return write_tensors(folder, _finite(tensors, self.checkpoint.path), shard_bytes)

    def check_parity(self, folder: Path, dtype: torch.dtype, say: Say) -> None:
        """Compare the logits of the checkpoint and of what was written, both in fp32.

        Where rounding to ``dtype`` moves the logits further than the tolerance, an fp32 export is made and
        compared instead, and what was written must be that, rounded.
        """
        sample = parity_check.sample_tokens(self.architecture.vocab_size, self.architecture.max_positions)
        expected = parity_check.checkpoint_outputs(self.checkpoint.path, self.checkpoint.args, sample)
        expected = expected.of_ids(self.architecture.vocab_size)
        written = parity_check.compare(parity_check.transformers_outputs(folder, sample), expected)
        if dtype is torch.float32 or written.excess is None:
            parity_check.require_parity(written, say)
            return
        with tempfile.TemporaryDirectory(dir=folder) as name:
            exact = Path(name)
            self.write_configuration(exact, torch.float32)
            self.write_weights(exact, torch.float32, 1 << 32)
            unrounded = parity_check.transformers_outputs(exact, sample)
            parity_check.require_parity(parity_check.compare(unrounded, expected), say)
            parity_check.require_rounded(folder, exact, dtype)
        say(f"Rounding to {dtype_name(dtype)} changes the logits by up to {written}")


def _finite(tensors: Iterable[tuple[str, Tensor]], checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors as they are, but for those with values that are no numbers."""
    for name, tensor in tensors:
        if not is_finite(tensor):
            change = "export an earlier checkpoint (--ckpt-step)"
            if tensor.dtype is torch.float16 and not tensor.isnan().any():
                change = "float16 ends at 65504: give --dtype bfloat16 or float32, or " + change
            raise UsageError(
                f"of {checkpoint}, {name} would have values that are NaN or infinite in "
                f"{dtype_name(tensor.dtype)}; {change}"
            )
        yield name, tensor
