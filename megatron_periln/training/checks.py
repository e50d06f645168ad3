"""Checks of the command line that Megatron leaves to a traceback, or to the end of the run."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path

from megatron_periln.errors import UsageError
from megatron_periln.norms import NormPlacement
from megatron_periln.norms.arguments import why_norms_stay_apart

__all__ = ["check_flags", "make_save_folder"]

# Megatron's flags that belong to another kind of training than GPT pretraining.
_OTHER_TRAINING = {
    "sft": "--sft",
    "fim_data": "--fim-data",
    "perform_rl_step": "--perform-rl-step",
    "logits_load_dir": "--logits-load-dir",
    "hybrid_context_parallel": "--hybrid-context-parallel",
}

_COUNTS = {
    "num_layers": "--num-layers",
    "hidden_size": "--hidden-size",
    "num_attention_heads": "--num-attention-heads",
    "tensor_model_parallel_size": "--tensor-model-parallel-size",
    "pipeline_model_parallel_size": "--pipeline-model-parallel-size",
    "context_parallel_size": "--context-parallel-size",
}


def check_flags(args: Namespace) -> None:
    """Check what the flags say, as parsed.

    Raises
    ------
    UsageError
        For another kind of training, a count that is not positive, norms that can't be one kernel, an
        interval that is missing, sizes that don't divide; or if this is no rank of a launcher's.
    """
    for name, flag in _OTHER_TRAINING.items():
        if getattr(args, name, None):
            raise UsageError(f"{flag} is not part of GPT pretraining with a norm placement; drop it")
    for name, flag in _COUNTS.items():
        count = getattr(args, name)
        if count is not None and count < 1:
            raise UsageError(f"{flag} must be positive, not {count}")
    if args.fuse_pre_mlp_norm:
        _check_fusion(args)
    _check_intervals(args)
    _check_non_persistent(args)
    _check_divisions(args)
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UsageError(
            f"{' and '.join(missing)} not set: start with "
            "torchrun --nproc-per-node N -m megatron_periln.pretrain"
        )


def _check_fusion(args: Namespace) -> None:
    reason = why_norms_stay_apart(
        NormPlacement.named(args.norm_placement),
        whole_layers=not args.hybrid_layer_pattern,
        recomputed=args.recompute_modules or (),
        offloaded=args.offload_modules or (),
        hidden_size=args.hidden_size,
    )
    if reason is not None:
        raise UsageError(reason)


def _check_intervals(args: Namespace) -> None:
    if args.save and args.save_interval is None:
        raise UsageError("--save needs --save-interval, the iterations between checkpoints")
    if args.eval_interval is None and not (args.skip_train or args.full_validation):
        raise UsageError(
            "give --eval-interval, the iterations between evaluations; with --eval-iters 0 there are none"
        )


def _check_non_persistent(args: Namespace) -> None:
    if args.non_persistent_save_interval and args.non_persistent_ckpt_type is None:
        raise UsageError("--non-persistent-save-interval needs --non-persistent-ckpt-type global or local")
    if args.non_persistent_ckpt_type != "global" or not args.non_persistent_global_ckpt_dir:
        return
    folder = Path(args.non_persistent_global_ckpt_dir).resolve()
    for flag, other in (("--save", args.save), ("--load", args.load)):
        if other and folder in (Path(other).resolve(), *Path(other).resolve().parents):
            raise UsageError(
                f"--non-persistent-global-ckpt-dir {folder} holds {flag} {other}: Megatron would delete "
                "every checkpoint in it but the newest; give a folder of its own"
            )


def _check_divisions(args: Namespace) -> None:
    hidden, heads = args.hidden_size, args.num_attention_heads
    tensor, pipeline = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    divisions = [
        ("--hidden-size", None if args.kv_channels else hidden, "--num-attention-heads", heads),
        ("--num-attention-heads", heads, "--tensor-model-parallel-size", tensor),
        ("--ffn-hidden-size", args.ffn_hidden_size, "--tensor-model-parallel-size", tensor),
        (
            "WORLD_SIZE",
            args.world_size,
            "tensor x pipeline x context parallel size",
            tensor * pipeline * args.context_parallel_size,
        ),
    ]
    if args.sequence_parallel:
        divisions.append(("--seq-length", args.seq_length, "--tensor-model-parallel-size", tensor))
    for dividend_name, dividend, divisor_name, divisor in divisions:
        if dividend and divisor and dividend % divisor:
            raise UsageError(
                f"{dividend_name} ({dividend}) must be divisible by {divisor_name} ({divisor}); "
                "change one of them"
            )


def make_save_folder(args: Namespace) -> None:
    """Make the folder that checkpoints go to, and check that it can be written.

    Raises
    ------
    UsageError
        If it can't.
    """
    if args.save is None or args.enable_msc:
        return
    folder = Path(args.save)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--save {folder}: {error.strerror}; give a folder that can be written") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"--save {folder} is not writable; give a folder that is")
