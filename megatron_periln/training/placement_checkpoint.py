"""The norm placement of a checkpoint against that of a run."""

from __future__ import annotations

import shlex
from argparse import Namespace
from pathlib import Path

from megatron_periln.checkpoints.saved_arguments import checkpoint_path, saved_arguments
from megatron_periln.checkpoints.sources import loads_from
from megatron_periln.errors import UsageError
from megatron_periln.norms import NormPlacement
from megatron_periln.norms.arguments import placement_flags, placement_of, set_placement
from megatron_periln.norms.settings import NORM_KINDS
from megatron_periln.training.batch_sizes import check_batch_sizes
from megatron_periln.training.datasets import data_order
from megatron_periln.training.model_settings import refuse_other_model, setting

__all__ = [
    "adopt_saved_placement",
    "consumed_samples",
    "refuse_other_local_placement",
    "refuse_other_placement",
]


def adopt_saved_placement(args: Namespace) -> None:
    """Set the placement arguments to the checkpoint's, as ``--use-checkpoint-args`` does for Megatron's."""
    saved = saved_arguments(args, loads_from(args))
    if saved is not None:
        set_placement(args, placement_of(saved))


def consumed_samples(args: Namespace) -> int:
    """Return how many samples the checkpoint to continue has been trained with, 0 without one."""
    if args.finetune or loads_from(args) != "load":
        return 0
    return getattr(saved_arguments(args), "consumed_train_samples", 0)


def refuse_other_placement(args: Namespace, placement: NormPlacement) -> None:
    """Refuse to load a checkpoint whose norms stand elsewhere, or compute something else.

    Raises
    ------
    UsageError
        Naming both placements. Megatron would drop or leave uninitialized the norms that only one
        of them has; or, for another epsilon or other frozen weights, go on with another model, or without
        a part of the optimizer's state.
    """
    load_arg = loads_from(args)
    path, saved = checkpoint_path(args, load_arg), saved_arguments(args, load_arg)
    if path is not None and saved is not None:
        _refuse_another(args, load_arg, path, saved, placement)
    elif path is None and load_arg == "pretrained_checkpoint":
        raise UsageError(
            f"--pretrained-checkpoint {args.pretrained_checkpoint}: there is no checkpoint; give the folder "
            "that --save wrote"
        )
    elif path is None and not args.perform_initialization and args.non_persistent_ckpt_type != "local":
        raise UsageError(
            "--no-initialization leaves weights as the memory was, and there is no checkpoint to load; give "
            "one by --load, or drop --no-initialization"
        )


def refuse_other_local_placement(args: Namespace, placement: NormPlacement, saved: Namespace) -> None:
    """Refuse to load a local checkpoint with the arguments ``saved``, as `refuse_other_placement` does.

    It is what the run goes on from: the batch sizes still to come are checked too.
    """
    _refuse_another(args, "load", Path(args.non_persistent_local_ckpt_dir) / "local", saved, placement)
    refuse_other_model(args, saved, args.non_persistent_local_ckpt_dir)
    check_batch_sizes(args, 0 if args.finetune else getattr(saved, "consumed_train_samples", 0))
    data_order.remember(saved)


def _refuse_another(
    args: Namespace, load_arg: str, path: Path, saved: Namespace, placement: NormPlacement
) -> None:
    theirs = placement_of(saved)
    origin = "" if hasattr(saved, "norm_placement") else ", written by stock Megatron,"
    _refuse_other_structure(load_arg, path, placement, theirs, origin)
    _refuse_other_gamma(args, path, saved)
    if load_arg == "load" and not args.finetune:
        _refuse_other_epsilon(args, path, saved, placement, theirs)
        _refuse_other_frozen_weights(args, path, saved, placement, theirs)
        _refuse_other_optimizer(args, path, saved)


def _refuse_other_structure(
    load_arg: str, path: Path, placement: NormPlacement, theirs: NormPlacement, origin: str
) -> None:
    if theirs.structure() == placement.structure():
        return
    warm = "; tools/warm_start.py makes a start of Peri-LN from it" if theirs.name == "pre" else ""
    flags = shlex.join(word for flag in placement_flags(theirs) for word in flag)
    raise UsageError(
        f"the checkpoint in {path.parent}{origin} has norm placement {theirs.structure()}, "
        f"and this run asks for {placement.structure()}; give {flags} to continue it, or another "
        f"--{load_arg.replace('_', '-')} (and --save) to start anew{warm}"
    )


def _refuse_other_gamma(args: Namespace, path: Path, saved: Namespace) -> None:
    centered = args.layernorm_zero_centered_gamma
    if getattr(saved, "layernorm_zero_centered_gamma", centered) != centered:
        was, other = ("without", "drop") if centered else ("with", "give")
        raise UsageError(
            f"the checkpoint in {path.parent} was trained {was} --apply-layernorm-1p, which "
            f"stores each norm weight less 1; {other} that flag"
        )


def _refuse_other_epsilon(
    args: Namespace, path: Path, saved: Namespace, placement: NormPlacement, theirs: NormPlacement
) -> None:
    for kind in NORM_KINDS:
        own, its = (each.settings_of(kind).epsilon for each in (placement, theirs))
        if own == its:
            continue
        now, before = own or setting(args, "layernorm_epsilon"), its or setting(saved, "layernorm_epsilon")
        if isinstance(before, float) and now != before:
            flag = "--output-norm-epsilon" if kind == "output" else f"--norm-rule with {kind}'s epsilon"
            raise UsageError(
                f"the checkpoint in {path.parent} was trained with an {kind} norm epsilon of {before:g}, and "
                f"this run asks for {now:g}; give {flag} {before:g} to continue it, or "
                "--finetune to start from its weights"
            )


def _refuse_other_frozen_weights(
    args: Namespace, path: Path, saved: Namespace, placement: NormPlacement, theirs: NormPlacement
) -> None:
    if theirs.freeze_output_norm != placement.freeze_output_norm and _loads_optimizer(args, path, saved):
        was, other = ("with", "give") if theirs.freeze_output_norm else ("without", "drop")
        raise UsageError(
            f"the checkpoint in {path.parent} was trained {was} --freeze-output-norm, and its optimizer "
            f"state is that of these parameters; {other} that flag to continue it, or give --finetune or "
            "--no-load-optim to start from its weights"
        )


def _refuse_other_optimizer(args: Namespace, path: Path, saved: Namespace) -> None:
    distributed = getattr(args, "use_distributed_optimizer", False)
    if getattr(saved, "use_distributed_optimizer", distributed) == distributed:
        return
    if args.optimizer not in ("adam", "sgd") or args.use_megatron_fsdp or args.freeze_all_layers:
        return  # Megatron's validation changes the flag
    if _loads_optimizer(args, path, saved):
        was, other = ("without", "drop") if distributed else ("with", "give")
        raise UsageError(
            f"the checkpoint in {path.parent} was trained {was} --use-distributed-optimizer, and its "
            f"optimizer state is laid out so; {other} that flag to continue it, or give --finetune or "
            "--no-load-optim to start from its weights"
        )


def _loads_optimizer(args: Namespace, path: Path, saved: Namespace) -> bool:
    weights_only = path.name == "release" or getattr(saved, "no_save_optim", False)
    return not (weights_only or args.no_load_optim)
