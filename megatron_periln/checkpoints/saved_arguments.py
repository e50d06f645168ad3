"""What a checkpoint says about its model.

Megatron saves its arguments with a checkpoint, ours among them. A checkpoint without ours comes
from stock Megatron, which is Pre-LN.
"""

from __future__ import annotations

import copy
import functools
import pickle
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.training import checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from megatron_periln.checkpoints.sources import (
    iteration_of,
    named_non_persistent,
    non_persistent_folder,
    tracker_of,
)
from megatron_periln.errors import UsageError
from megatron_periln.patches import checkpoint_loading

__all__ = ["checkpoint_path", "saved_arguments"]


def checkpoint_path(args: Namespace, load_arg: str = "load") -> Path | None:
    """Return the folder of the iteration that ``args`` would load, None if there is none.

    Parameters
    ----------
    args
        Has the attribute ``load_arg``, and ``ckpt_step``, which is honoured.
    load_arg
        ``"load"`` or ``"pretrained_checkpoint"``.

    Raises
    ------
    UsageError
        If the folder names an iteration that is not there, or is a single checkpoint itself.
    """
    folder, flag = getattr(args, load_arg), f"--{load_arg.replace('_', '-')}"
    if folder is None:
        return None
    if dist_checkpointing.check_is_distributed_checkpoint(folder):
        raise UsageError(f"{flag} {folder} is one checkpoint; give the folder above it, and --ckpt-step")
    named, tracker = tracker_of(Path(folder)), checkpointing.get_checkpoint_tracker_filename(folder)
    if named is not None and not named.isdecimal() and named != "release":
        raise UsageError(f"{tracker} names no iteration but {named!r}; write the number of one into it")
    persistent = None
    if named is not None or args.ckpt_step:
        persistent = Path(checkpointing.get_load_checkpoint_path_by_args(args, load_arg))
    path = _non_persistent_path(args, load_arg, persistent) or persistent
    if path is not None and not path.is_dir():
        numbers = sorted(number for inner in path.parent.glob("iter_*") if (number := iteration_of(inner)))
        place = f"{flag} {folder}" if path is persistent else str(path.parent)
        advice = (
            "give another --ckpt-step"
            if args.ckpt_step
            else f"correct {Path(tracker).name}, or give --ckpt-step"
        )
        if not numbers:
            raise UsageError(
                f"{place}: there is no {path.name}, and no other; give the folder that --save wrote"
            )
        found = ", ".join(map(str, numbers))
        raise UsageError(f"{place}: there is no {path.name}, but {found}; {advice}")
    return path


def _non_persistent_path(args: Namespace, load_arg: str, persistent: Path | None) -> Path | None:
    """Return the folder of the global non-persistent checkpoint if it is the one to load."""
    folder = non_persistent_folder(args, load_arg)
    if folder is None or named_non_persistent(args, load_arg) is None:
        return None
    # Megatron's, as `patches.checkpoint_choice` may have changed it.
    newest = checkpointing._get_non_persistent_iteration(str(folder), args)
    if newest == -1 or newest < (-1 if persistent is None else iteration_of(persistent) or 0):
        return None
    return None if args.ckpt_step and newest != args.ckpt_step else folder / f"iter_{newest:07d}"


def saved_arguments(args: Namespace, load_arg: str = "load") -> Namespace | None:
    """Return the arguments saved with the checkpoint that ``args`` would load, None if there is none.

    Parameters are those of `checkpoint_path`, and errors, and one if the checkpoint can't be read.
    """
    path = checkpoint_path(args, load_arg)
    if path is None:
        return None
    return copy.copy(_read(path, _stamp(path)))  # whoever asks may change it


def _stamp(path: Path) -> tuple[tuple[int, int], ...]:
    """Return what tells whether a checkpoint is still the one that was read."""
    files = (path, path / ".metadata", path / "common.pt", *_files_of_ranks(path)[:1])
    return tuple(
        (seen.st_mtime_ns, seen.st_size) for seen in (file.stat() for file in files if file.exists())
    )


def _files_of_ranks(path: Path) -> list[Path]:
    return sorted(path.glob("mp_rank_00*/model_optim_rng.pt"))


@functools.lru_cache(1)  # asked for three times by each rank that starts; of a large model it has many MB
def _read(path: Path, _: tuple[tuple[int, int], ...]) -> Namespace | None:
    checkpoint_loading.restrict()
    state: dict[str, Any] = {}
    try:
        if dist_checkpointing.check_is_distributed_checkpoint(str(path)):
            state = dist_checkpointing.load_common_state_dict(str(path))
        elif (path / ".metadata").is_file():  # torch_dcp, fsdp_dtensor
            state = {"args": None}
            if "args" in dcp.FileSystemReader(path).read_metadata().state_dict_metadata:
                dcp.load(state, checkpoint_id=path, no_dist=True)
        elif ranks := _files_of_ranks(path):
            state = torch.load(ranks[0], map_location="cpu", mmap=True)
    except CheckpointException as error:
        reason = checkpoint_loading.why_unreadable(path) or next(iter(error.failures.values()), (error,))[0]
        raise UsageError(f"{path} can't be read: {reason}") from error
    except (pickle.UnpicklingError, OSError, RuntimeError) as error:
        raise UsageError(f"{path} can't be read: {error}") from error
    return state.get("args")
