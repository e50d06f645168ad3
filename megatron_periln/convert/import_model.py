"""Importing a model of transformers as a checkpoint for Megatron."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_periln.convert import parity_check
from megatron_periln.convert.architecture import Architecture
from megatron_periln.convert.hf_config import architecture_of, read_config
from megatron_periln.convert.megatron_flags import flag_file, model_arguments
from megatron_periln.convert.safetensors_folder import Tensors, dtype_name, is_finite
from megatron_periln.convert.source.memory_names import under_names_of_files
from megatron_periln.convert.source.tensors import check_tensors
from megatron_periln.convert.targets import Target
from megatron_periln.convert.weights import VOCABULARY_TABLES, imported_tensor, without_scales
from megatron_periln.errors import UsageError
from megatron_periln.files import new_folder
from megatron_periln.models.one_process import (
    build_model,
    load_model,
    megatron_config,
    save_model,
    single_process,
)

__all__ = ["FLAG_FILE", "ImportOptions", "import_model"]

FLAG_FILE = "model.flags"
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """How to import.

    Parameters
    ----------
    dtype
        Of the checkpoint's tensors; None for that of the model's.
    verify
        Compare the logits of both models before the folder gets its name. Names, dtypes and shapes of the
        tensors are compared with the configuration always.
    vocabulary_multiple
        Pad the vocabulary with rows of zeros to a multiple of this, which tensor parallelism divides.
    """

    dtype: torch.dtype | None = None
    verify: bool = True
    vocabulary_multiple: int = 1


def import_model(model: Path, output: Path, options: ImportOptions, say: Say = print) -> None:
    """Import a model, and check the checkpoint's parity before it appears.

    Parameters
    ----------
    model
        A folder with config.json and safetensors files.
    output
        The folder to write, for ``--load``; with the model's flags in a file beside the checkpoint.
    options
        How.
    say
        Receives one line for each thing worth knowing.

    Raises
    ------
    UsageError
        If the model can't be read, or Megatron can't compute it, or the parity check fails; ``output``
        is then not there.
    """
    config, target, said = read_config(model)
    source = architecture_of(config, target)
    tensors = under_names_of_files(Tensors(model), source, target, said)
    check_tensors(tensors, source, target, said)
    dtype = options.dtype or tensors[target.tensor_name("embedding.weight")].dtype
    architecture = without_scales(source)
    padded = -(-source.vocab_size // options.vocabulary_multiple) * options.vocabulary_multiple
    architecture = replace(architecture, vocab_size=padded)
    say(f"Source: {target.architecture}, norm placement {architecture.placement.name}")
    if without_scales(source) != source:
        say("Its multipliers are folded into the weights: an export will have none")
    if padded != source.vocab_size:
        say(
            f"Its vocabulary of {source.vocab_size:,} is padded to {padded:,}: an export will have "
            f"{source.vocab_size:,}"
        )
    tokenizer = model.absolute() if (model / "tokenizer.json").is_file() else None
    flags = flag_file(architecture, dtype, output.absolute(), tokenizer, source.vocab_size)
    args = model_arguments(architecture, dtype, tokenizer, source.vocab_size)
    with new_folder(output, flag="--output") as folder:
        (folder / FLAG_FILE).write_text(flags)
        with single_process():
            built = build_model(megatron_config(args, dtype))
            _fill(built, tensors, source, target)
            path = save_model(folder, args, built)
            del built
        if options.verify:
            _check_parity(model, path, args, tensors, source, target, dtype, say)
        else:
            say("The logits were not compared (--no-verify)")
    say(f"Wrote {output}. Go on training with these flags, as @{output / FLAG_FILE}:")
    say(flags.rstrip())


@torch.no_grad()
def _fill(model: GPTModel, tensors: Tensors, source: Architecture, target: Target) -> None:
    """Copy the source's tensors into the model; all that it has has a place in a checkpoint."""
    filled = 0

    def read(name: str) -> Tensor:
        tensor = tensors[name]
        if not is_finite(tensor):
            raise UsageError(
                f"{tensors.path(name)} has {name} with values that are NaN or infinite, from which nobody "
                "can go on training; download the model again, or take an earlier one"
            )
        return tensor

    for key, sharded in model.sharded_state_dict().items():
        if not isinstance(sharded, ShardedTensor | ShardedTensorFactory):
            continue
        layer, expert = (int(found[1]) if found else 0 for found in (_LAYER.match(key), _EXPERT.search(key)))
        tensor = imported_tensor(read, source, target, sharded.key, layer, expert)
        if sharded.key in VOCABULARY_TABLES:
            tensor = F.pad(tensor, (0, 0, 0, len(sharded.data) - len(tensor)))
        sharded.data.copy_(tensor)
        if not is_finite(sharded.data):
            raise UsageError(
                f"{tensors.folder} has values up to {tensor.abs().max():.3g}, in what becomes {key}, beyond "
                f"{dtype_name(sharded.data.dtype)}; give --dtype bfloat16 or float32"
            )
        filled += tensor.numel()
    saved = [*model.parameters(), *(bias for name, bias in model.named_buffers() if "expert_bias" in name)]
    total = sum(tensor.numel() for tensor in saved)
    assert filled == total, f"{filled} of {total} parameters were imported"


def _check_parity(
    model: Path,
    path: Path,
    args: Namespace,
    tensors: Tensors,
    source: Architecture,
    target: Target,
    dtype: torch.dtype,
    say: Say,
) -> None:
    """Compare the outputs of the model and of the checkpoint made of it, both in fp32.

    Where rounding to ``dtype`` moves them further than the tolerance, the model is filled in fp32 and
    compared instead, and what was saved must be that, rounded.
    """
    sample = parity_check.sample_tokens(source.vocab_size, source.max_positions)
    expected = parity_check.transformers_outputs(model, sample)
    ours = parity_check.checkpoint_outputs(path, args, sample).of_ids(source.vocab_size)
    saved = parity_check.compare(ours, expected)
    if dtype is torch.float32 or saved.excess is None:
        parity_check.require_parity(saved, say)
        return
    with single_process():
        exact = build_model(megatron_config(args))
        _fill(exact, tensors, source, target)
        parity_check.require_parity(
            parity_check.compare(
                parity_check.megatron_outputs(exact, sample).of_ids(source.vocab_size), expected
            ),
            say,
        )
        _require_rounded(load_model(path, megatron_config(args, dtype)), exact, dtype)
    say(f"Rounding to {str(dtype).removeprefix('torch.')} changes the logits by up to {saved}")


def _require_rounded(saved: GPTModel, exact: GPTModel, dtype: torch.dtype) -> None:
    ours = dict(saved.named_parameters())
    for name, parameter in exact.named_parameters():
        if not torch.equal(ours[name], parameter.to(dtype)):
            raise UsageError(f"{name} was not saved as it was computed; nothing was written")
