"""Megatron's flags for an architecture, and the arguments that it parses from them."""

from __future__ import annotations

import shlex
from argparse import Namespace
from pathlib import Path

import torch

from megatron_periln.convert.architecture import Architecture
from megatron_periln.convert.experts.flags import expert_flags
from megatron_periln.megatron_arguments import megatron_arguments
from megatron_periln.norms.arguments import placement_flags, set_placement

__all__ = ["flag_file", "model_arguments", "model_flags"]

_PRECISIONS = {torch.bfloat16: ["--bf16"], torch.float16: ["--fp16"], torch.float32: []}


def model_flags(architecture: Architecture, dtype: torch.dtype) -> list[list[str]]:
    """Return Megatron's flags for a model without scales of its own: each a flag and its value.

    Our own are not among them: the norm placement (`megatron_periln.norms.arguments.placement_flags`) and
    ``--whole-qk-norm``.
    """
    rope, biases = architecture.rope, architecture.biases
    numbers = {
        "--num-layers": architecture.num_layers,
        "--hidden-size": architecture.hidden_size,
        "--ffn-hidden-size": architecture.ffn_hidden_size,
        "--num-attention-heads": architecture.num_heads,
        "--num-query-groups": architecture.num_kv_heads,
        "--kv-channels": architecture.head_dim,
        "--padded-vocab-size": architecture.vocab_size,
        "--max-position-embeddings": architecture.max_positions,
        "--norm-epsilon": architecture.eps,
        "--rotary-base": int(rope.theta),
        "--rotary-percent": rope.fraction,
    }
    switches = {
        "--group-query-attention": True,
        "--swiglu": True,
        "--rotary-interleaved": rope.interleaved,
        "--qk-layernorm": architecture.qk_norm,
        "--attention-output-gate": architecture.attention_gate,
        "--disable-bias-linear": "mlp" not in biases,
        "--add-qkv-bias": biases == {"qkv"},
        "--untie-embeddings-and-output-weights": not architecture.tied,
    }
    return [
        *([flag, str(value)] for flag, value in numbers.items()),
        ["--normalization", "RMSNorm"],
        ["--position-embedding-type", "yarn" if rope.scaling and rope.scaling.kind == "yarn" else "rope"],
        *(rope.scaling.as_flags() if rope.scaling else []),
        *expert_flags(architecture.experts),
        *(architecture.kinds.flags() if architecture.kinds else []),
        ["--attention-dropout", "0"],
        ["--hidden-dropout", "0"],
        *([flag] for flag, wanted in switches.items() if wanted),
        *([flag] for flag in _PRECISIONS[dtype]),
    ]


def _padding_flags(vocab_size: int, architecture: Architecture) -> list[list[str]]:
    """Return what says how much of the vocabulary is padding, for an export to take it off again."""
    return [["--unpadded-vocab-size", str(vocab_size)]] if vocab_size < architecture.vocab_size else []


def _tokenizer_flags(folder: Path | None) -> list[list[str]]:
    if folder is None:
        return []
    return [["--tokenizer-type", "HuggingFaceTokenizer"], ["--tokenizer-model", str(folder)]]


def flag_file(
    architecture: Architecture,
    dtype: torch.dtype,
    checkpoint: Path,
    tokenizer: Path | None,
    vocab_size: int | None = None,
) -> str:
    """Return the text of a flag file with which the imported model goes on training.

    Parameters
    ----------
    architecture, dtype, checkpoint, tokenizer
        What it is about.
    vocab_size
        The vocabulary without padding; None if there is none.
    """
    flags = [
        *placement_flags(architecture.placement),
        *([["--whole-qk-norm"]] if architecture.whole_qk_norm else []),
        *model_flags(architecture, dtype),
        *_padding_flags(vocab_size or architecture.vocab_size, architecture),
        ["--load", str(checkpoint)],
        *_tokenizer_flags(tokenizer),
    ]
    return "".join(f"{shlex.join(flag)}\n" for flag in flags)


def model_arguments(
    architecture: Architecture,
    dtype: torch.dtype,
    tokenizer: Path | None = None,
    vocab_size: int | None = None,
) -> Namespace:
    """Return Megatron's arguments for a model, as they are saved with its checkpoint."""
    length = ["--seq-length", str(architecture.max_positions)]
    flags = [*model_flags(architecture, dtype), length, *_tokenizer_flags(tokenizer)]
    args = megatron_arguments([word for flag in flags for word in flag])
    args.params_dtype = dtype
    args.add_position_embedding = True
    args.whole_qk_norm = architecture.whole_qk_norm
    args.unpadded_vocab_size = vocab_size if vocab_size != architecture.vocab_size else None
    set_placement(args, architecture.placement)
    return args
