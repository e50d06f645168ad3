"""Rules for what a run can't do without, and for its schedule: Megatron finds it once all is built."""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from megatron.core.datasets.object_storage_utils import is_object_storage_path

from megatron_periln.rules import Check, Rule
from megatron_periln.training.packages import installed

__all__ = ["NEEDED", "SCHEDULE"]


def _missing(args: Namespace) -> Iterator[str]:
    """Yield what no model can be without; that of a checkpoint whose arguments are not known yet has all."""
    layers = args.hybrid_layer_pattern or args.hybrid_override_pattern or args.encoder_num_layers
    needed = {
        "--num-layers": args.num_layers or layers,
        "--hidden-size": args.hidden_size,
        "--num-attention-heads": args.num_attention_heads,
        "--seq-length": args.seq_length or args.encoder_seq_length,
        "--max-position-embeddings": args.max_position_embeddings,
    }
    missing = [flag for flag, value in needed.items() if value is None]
    if missing and not args.use_checkpoint_args:
        verb = "is" if len(missing) == 1 else "are"
        yield f"{', '.join(missing)} {verb} missing: a model has no size without"


NEEDED: tuple[Check, ...] = (_missing,)
"""Sizes without which nothing else can be judged."""


def _data_files(args: Namespace) -> Iterator[str]:
    for flag in ("--data-args-path", "--per-split-data-args-path"):
        name = flag.removeprefix("--").replace("-", "_")
        path = getattr(args, name)
        if path is None or is_object_storage_path(path):
            continue
        try:
            text = Path(path).read_text()
            if name.startswith("per_split"):
                lists = [json.loads(text)[part] for part in ("train", "valid", "test")]
                if not all(isinstance(part, str | list | None) for part in lists):
                    raise TypeError
            continue
        except OSError as error:
            yield f"{flag} {path}: cannot be read: {error.strerror}; give a file"
        except (ValueError, LookupError, TypeError):
            yield f"{flag} {path}: not JSON with train, valid and test, a list of datasets each; correct it"
        setattr(args, name, None)


# Folders that a run makes, by flag, and files, in whose folder it writes them.
_FOLDERS = (
    "--ckpt-convert-save",
    "--data-cache-path",
    "--dump-param-to-param-group-map",
    "--moe-routing-trace-path",
    "--non-persistent-global-ckpt-dir",
    "--non-persistent-local-ckpt-dir",
    "--tensorboard-dir",
    "--wandb-save-dir",
)
_FILES = ("--result-rejected-tracker-filename",)


def _folders(args: Namespace) -> Iterator[str]:
    """Find folders that can't be made: Megatron finds it once all is built, or says another thing."""
    for flag in (*_FOLDERS, *_FILES):
        name = flag.removeprefix("--").replace("-", "_")
        given = getattr(args, name)
        if not given or is_object_storage_path(given):
            continue
        path = Path(given).absolute()
        folder = path.parent if flag in _FILES else path
        there = next(each for each in (folder, *folder.parents) if os.path.lexists(each))
        made_by_user = flag in _FILES and there != folder  # what writes the file makes no folder
        if made_by_user or not _takes_files(
            there, args, reads=flag == "--data-cache-path" and there == folder
        ):
            yield f"{flag} {given}: can't be made in {there}; give a folder that can"
            setattr(args, name, None)


def _takes_files(folder: Path, args: Namespace, *, reads: bool) -> bool:
    """Tell whether a folder is one, and can be written; the first rank tries, and leaves nothing."""
    if not folder.is_dir() or not (reads or os.access(folder, os.W_OK)):
        return False
    if args.rank == 0 and not reads:
        try:
            tempfile.TemporaryDirectory(dir=folder).cleanup()
        except OSError:
            return False
    return True


def _layer_specs(args: Namespace) -> Iterator[str]:
    """Find specs that can't be imported: Megatron prints that, and builds its own layers instead."""
    if not args.spec:
        return
    given = f"--spec {' '.join(args.spec)}"
    try:
        module, name = args.spec
        getattr(importlib.import_module(module), name)
        return
    except ImportError as error:
        yield f"{given}: cannot be imported: {error}; correct it, or drop it for Megatron's own layers"
    except AttributeError:
        yield f"{given}: the module has no {args.spec[-1]}; correct it, or drop it for Megatron's own layers"
    except ValueError:
        yield f"{given}: takes two words, a module and the name of specs in it; correct it, or drop it"
    args.spec = None


def _warmup(args: Namespace) -> Iterator[str]:
    """Yield what OptimizerParamScheduler (megatron/core/optimizer_param_scheduler.py) needs."""
    unit = "iters" if args.train_iters else "samples"
    whole = getattr(args, f"train_{unit}")
    decay, warmup = getattr(args, f"lr_decay_{unit}"), getattr(args, f"lr_warmup_{unit}")
    if args.skip_train or not whole:
        return
    shown = f"--lr-decay-{unit} ({decay})" if decay is not None else f"--train-{unit} ({whole})"
    decay = whole if decay is None else decay
    if args.lr_warmup_fraction is None and warmup and warmup >= decay:
        yield f"--lr-warmup-{unit} ({warmup}) must be less than {shown}; change one of them"
        setattr(args, f"lr_warmup_{unit}", 0)
    elif args.lr_warmup_fraction is not None and args.lr_warmup_fraction >= 1:
        yield f"--lr-warmup-fraction ({args.lr_warmup_fraction:g}) must be less than 1, a share of {shown}"
        args.lr_warmup_fraction = None
    if args.lr_decay_style == "WSD" and getattr(args, f"lr_wsd_decay_{unit}") is None:
        yield f"--lr-decay-style WSD needs --lr-wsd-decay-{unit}, how long the rate decays at the end"
        setattr(args, f"lr_wsd_decay_{unit}", 1)


def _snapshots(args: Namespace) -> Iterator[str]:
    """Yield what training would stop at, in the iteration that is to be written."""
    for what in ("activations", "dgrads", "params", "tokens_per_expert", "wgrads"):
        name = f"save_{what}_interval"
        flag = f"--{name.replace('_', '-')}"
        if getattr(args, name) is None:
            continue
        if args.save is None:
            yield f"{flag} needs --save, the folder that they are written to; give it, or drop {flag}"
        elif what in ("activations", "dgrads") and not installed("transformer_engine"):
            yield f"{flag} needs Transformer Engine, which is not installed; drop it"
        else:
            continue
        setattr(args, name, None)


def _trains(args: Namespace) -> bool:
    return not args.skip_train


SCHEDULE: tuple[Check, ...] = (
    _data_files,
    _folders,
    _layer_specs,
    Rule(
        lambda args: args.micro_batch_size is None,
        "--micro-batch-size is missing: give the sequences of a rank's step",
        {"micro_batch_size": 1},
    ),
    Rule(
        lambda args: args.train_iters and args.train_samples,
        "--train-iters and --train-samples are two lengths of the run; give one of them",
        {"train_samples": None, "lr_decay_samples": None, "lr_warmup_samples": 0},
    ),
    Rule(
        lambda args: args.phase_transition_iterations and not args.train_samples,
        "--phase-transition-iterations counts samples: give --train-samples in the place of --train-iters",
        {"phase_transition_iterations": None},
    ),
    Rule(
        lambda args: args.lazy_mpu_init,
        "--lazy-mpu-init: megatron-core's pretraining never makes up for what it puts off; drop it",
        {"lazy_mpu_init": False},
    ),
    _snapshots,
    Rule(
        lambda args: _trains(args) and args.lr is None,
        "--lr is missing: give the learning rate",
        {"lr": float("inf")},
    ),
    Rule(
        lambda args: args.lr is not None and args.min_lr is not None and args.min_lr > args.lr,
        "--min-lr ({min_lr:g}) must be at most --lr ({lr:g})",
        {"min_lr": 0.0},
    ),
    Rule(
        lambda args: _trains(args) and args.lr is not None and args.lr_warmup_init > args.lr,
        "--lr-warmup-init ({lr_warmup_init:g}) must be at most --lr ({lr:g})",
        {"lr_warmup_init": 0.0},
    ),
    _warmup,
    Rule(
        lambda args: _trains(args) and not (args.train_iters or args.train_samples),
        "--train-iters is missing: give it, or --train-samples",
    ),
    Rule(
        lambda args: args.fp16 and args.bf16,
        "--fp16 and --bf16 are two dtypes of training; give one of them",
        {"fp16": False},
    ),
    Rule(
        lambda args: args.override_opt_param_scheduler and args.use_checkpoint_opt_param_scheduler,
        "--override-opt_param-scheduler and --use-checkpoint-opt_param-scheduler contradict each other; give "
        "one of them",
        {"override_opt_param_scheduler": False},
    ),
    Rule(
        lambda args: (
            None not in (args.start_weight_decay, args.end_weight_decay)
            and args.start_weight_decay > args.end_weight_decay
        ),
        "--start-weight-decay ({start_weight_decay:g}) must be at most --end-weight-decay "
        "({end_weight_decay:g}): weight decay only grows",
        {"start_weight_decay": 0.0},
    ),
)
"""What training can't begin without, and the schedules that it can't follow."""
