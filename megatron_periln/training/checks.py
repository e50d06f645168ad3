"""Checks of the command line that Megatron leaves to a traceback, or to the end of the run."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path

from megatron.core.dist_checkpointing.strategies.torch import get_async_strategy
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.core.optimizer.emerging_optimizers import HAVE_EMERGING_OPTIMIZERS
from megatron.core.transformer.enums import AttnBackend

from megatron_periln.errors import UsageError
from megatron_periln.models.hybrid import why_no_place
from megatron_periln.norms import NormPlacement
from megatron_periln.norms.arguments import why_norms_stay_apart

__all__ = ["check_flags", "check_model", "make_save_folder"]

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
    "micro_batch_size": "--micro-batch-size",
    "global_batch_size": "--global-batch-size",
    "eval_micro_batch_size": "--eval-micro-batch-size",
    "eval_global_batch_size": "--eval-global-batch-size",
}


def check_flags(args: Namespace) -> None:
    """Check what the flags say, as parsed.

    Raises
    ------
    UsageError
        For another kind of training, a count that is not positive, an interval that is missing, sizes that
        don't divide; or if this is no rank of a launcher's.
    """
    for name, flag in _OTHER_TRAINING.items():
        if getattr(args, name, None):
            raise UsageError(f"{flag} is not part of GPT pretraining with a norm placement; drop it")
    for name, flag in _COUNTS.items():
        count = getattr(args, name)
        if count is not None and count < 1:
            raise UsageError(f"{flag} must be positive, not {count}")
    _check_intervals(args)
    _check_non_persistent(args)
    _check_divisions(args)  # once more with a checkpoint's sizes: before that, ranks wait for each other
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UsageError(
            f"{' and '.join(missing)} not set: start with "
            "torchrun --nproc-per-node N -m megatron_periln.pretrain"
        )


def check_model(args: Namespace, placement: NormPlacement) -> None:
    """Check the model that the flags describe, or the checkpoint where ``--use-checkpoint-args`` asks it.

    Raises
    ------
    UsageError
        For sizes that don't divide, norms that can't be one kernel, layers in which no norm can stand, and
        what can't be built with what is installed here.
    """
    _check_divisions(args)
    if args.fuse_pre_mlp_norm:
        _check_fusion(args, placement)
    if args.hybrid_layer_pattern:
        _check_hybrid(args, placement)
    if args.num_experts and args.moe_router_topk > args.num_experts:
        raise UsageError(
            f"--moe-router-topk ({args.moe_router_topk}) must be at most --num-experts ({args.num_experts})"
        )
    if args.attention_backend is AttnBackend.local and not args.spec:
        raise UsageError(
            "--attention-backend local needs --spec local; drop it, or give --transformer-impl local"
        )
    stages = args.num_layers_per_virtual_pipeline_stage or args.num_virtual_stages_per_pipeline_rank
    if args.moe_use_upcycling and stages:
        raise UsageError(
            "--moe-use-upcycling: megatron-core takes the dense model for the mixture with virtual pipeline "
            "stages; upcycle in a run without them, and go on with them from its checkpoint"
        )
    if args.multiple_validation_sets and not args.full_validation:
        raise UsageError("--multiple-validation-sets needs --full-validation; give it too, or drop both")
    if args.optimizer not in ("adam", "sgd") and not HAVE_EMERGING_OPTIMIZERS:
        raise UsageError(
            f"--optimizer {args.optimizer} needs the package emerging-optimizers, which is not installed; "
            "install it, or choose adam or sgd"
        )
    if args.dist_ckpt_strictness.startswith("return_"):
        raise UsageError(
            f"--dist-ckpt-strictness {args.dist_ckpt_strictness}: megatron-core's training can't take the "
            "keys that it returns; give log_unexpected or log_all, which print them"
        )
    if args.async_save and args.use_persistent_ckpt_worker and args.save is not None:
        _check_asynchronous_saves(args)


def _check_asynchronous_saves(args: Namespace) -> None:
    try:
        get_async_strategy(args.async_strategy)
    except ImportError as error:
        raise UsageError(
            f"--async-save with --async-strategy {args.async_strategy} needs the package "
            "nvidia-resiliency-ext, which is not installed, or not in a version that Megatron can use; "
            "install it, or give --async-strategy mcore"
        ) from error


def _check_hybrid(args: Namespace, placement: NormPlacement) -> None:
    reason = why_no_place(args.hybrid_layer_pattern, placement)
    if reason is not None:
        raise UsageError(reason)
    if Symbols.MTP_SEPARATOR in args.hybrid_layer_pattern and args.transformer_impl == "local":
        raise UsageError(
            f"--hybrid-layer-pattern {args.hybrid_layer_pattern!r}: multi-token prediction, after the "
            f"{Symbols.MTP_SEPARATOR}, needs Transformer Engine in a hybrid model; drop that part, or train "
            "without --hybrid-layer-pattern and with --mtp-num-layers"
        )


def _check_fusion(args: Namespace, placement: NormPlacement) -> None:
    if args.heterogeneous_layers_config_path or args.heterogeneous_layers_config_encoded_json:
        raise UsageError(
            "--fuse-pre-mlp-norm: the layers of --heterogeneous-layers-config-path need not have both "
            "sublayers; drop one of them"
        )
    reason = why_norms_stay_apart(
        placement,
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
    groups = args.num_query_groups if args.group_query_attention else None
    divisions = [
        ("--hidden-size", None if args.kv_channels else hidden, "--num-attention-heads", heads),
        ("--num-attention-heads", heads, "--tensor-model-parallel-size", tensor),
        ("--num-attention-heads", heads, "--num-query-groups", groups),
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
