"""Which checkpoint a run goes on from: the newest that is what was saved."""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace
from pathlib import Path

from megatron_periln.checkpoints import local
from megatron_periln.checkpoints.manifest import MANIFEST, BrokenCheckpointError, Manifest
from megatron_periln.checkpoints.rendezvous import Rendezvous
from megatron_periln.checkpoints.sources import (
    Candidate,
    candidates,
    is_complete,
    loads_from,
    named_non_persistent,
    non_persistent_folder,
    take,
)
from megatron_periln.errors import UsageError
from megatron_periln.patches import checkpoint_choice

__all__ = ["FLAG_GROUP", "add_checkpoint_arguments", "choose_intact_checkpoint"]

FLAG_GROUP = "checkpoints"


def add_checkpoint_arguments(parser: ArgumentParser) -> None:
    """Add the group of flags to a parser."""
    group = parser.add_argument_group(title=FLAG_GROUP)
    group.add_argument(
        "--checkpoint-verify",
        choices=("full", "size", "off"),
        default="full",
        help="check checksums, or sizes, and pass over broken checkpoints; default: full",
    )


def choose_intact_checkpoint(args: Namespace) -> bool:
    """Check the checkpoint that ``args`` would load; have an older one loaded if it is broken.

    All ranks share the reading, and rank 0 tells in a line which is broken, which file, and which is
    used. A checkpoint that ``--ckpt-step`` asks for, and a pretrained one, have no substitute. Local
    checkpoints are no substitutes either: where the newest intact one is newer than what ``--load`` names, it
    is what Megatron takes, and nothing else is read.

    Parameters
    ----------
    args
        Megatron's and ours, parsed. ``ckpt_step`` and ``pretrained_checkpoint`` may change.

    Returns
    -------
    bool
        Whether it is a local checkpoint, whose arguments are known once it is loaded.

    Raises
    ------
    UsageError
        On every rank, if there is a checkpoint and none is intact.
    """
    if args.enable_msc:
        return False
    ranks = Rendezvous(args)
    newest_local = local.newest_intact(args, ranks)
    _go_on_rather_than_start_anew(args, ranks, newest_local)
    flag = loads_from(args)
    return getattr(args, flag) is not None and not _choose(args, flag, ranks, newest_local)


def _go_on_rather_than_start_anew(args: Namespace, ranks: Rendezvous, newest_local: int) -> None:
    """Leave the pretrained checkpoint alone where the run has a non-persistent checkpoint of its own.

    Megatron looks for persistent ones only, and would start anew, or even from that non-persistent one's
    weights.
    """
    if loads_from(args) == "load":
        return
    own: str | None = None
    if ranks.rank == 0:
        named = named_non_persistent(args)
        own = f"{non_persistent_folder(args)}, iteration {named}" if named is not None else None
        if newest_local >= 0:
            own = f"{args.non_persistent_local_ckpt_dir}, iteration {newest_local}"
    own = ranks.broadcast(own)
    if own is None:
        return
    if args.load is None:
        raise UsageError(
            f"there is a non-persistent checkpoint in {own}, which Megatron would take for the weights of "
            f"--pretrained-checkpoint {args.pretrained_checkpoint}; give --load to go on from it, or another "
            "folder for non-persistent checkpoints"
        )
    if ranks.rank == 0:
        print(f"--load {args.load}: goes on from {own}, not from --pretrained-checkpoint", flush=True)
    args.pretrained_checkpoint = None


def _choose(args: Namespace, load_arg: str, ranks: Rendezvous, newest_local: int) -> bool:
    """Choose among checkpoints that all ranks share; return False if a local one is as new or newer."""
    folder, flag = Path(getattr(args, load_arg)), f"--{load_arg.replace('_', '-')}"
    error, listed = ranks.broadcast(_listed(args, load_arg) if ranks.rank == 0 else None)
    if error is not None:
        raise UsageError(error)
    found = [Candidate(Path(path), persistent) for path, persistent in listed]
    if args.ckpt_step and newest_local > args.ckpt_step:
        checkpoint_choice.replace_non_persistent({newest_local: -1})
    elif newest_local >= max((one.iteration for one in found), default=0):
        return False
    broken: list[str] = []
    for candidate in found:
        name = candidate.path.name if candidate.path.parent == folder else str(candidate.path)
        reason = None
        if args.checkpoint_verify != "off":
            reason = _verify(candidate.path, args.checkpoint_verify == "full", ranks)
        if reason is None:
            if broken and ranks.rank == 0:
                print(f"{flag} {folder}: {'; '.join(broken)}; using {name}", flush=True)
            take(args, load_arg, candidate)
            return True
        broken.append(f"{name} is broken: {reason}")
    if broken:
        raise UsageError(
            f"{flag} {folder}: {'; '.join(broken)}; restore a file that is named, give another {flag}, "
            "or load it as it is with --checkpoint-verify off"
        )
    return True


def _listed(args: Namespace, load_arg: str) -> tuple[str | None, list[tuple[str, bool]]]:
    """Return what is wrong with the trackers, and the candidates, in what JSON can hold."""
    try:
        return None, [(str(one.path), one.persistent) for one in candidates(args, load_arg)]
    except UsageError as error:
        return str(error), []


def _verify(path: Path, full: bool, ranks: Rendezvous) -> str | None:
    """Return what is wrong with a checkpoint, None if nothing is; the same on every rank."""
    started = time.perf_counter()
    manifest, reason = _look(path) if ranks.rank == 0 else (None, None)
    reason, listed = ranks.broadcast([reason, manifest is not None])
    if reason is None and listed and full:
        try:
            manifest = manifest or Manifest.read(path)
            if manifest is None:
                raise BrokenCheckpointError(f"{MANIFEST} is not there on rank {ranks.rank}")
            manifest.check_sums(path, ranks.rank, ranks.size)
        except BrokenCheckpointError as error:
            reason = str(error)
        reason = ranks.broadcast(next(filter(None, ranks.gather(reason)), None))
    if reason is None and ranks.rank == 0:
        print(f"checkpoint {path}: {_verdict(manifest, full, time.perf_counter() - started)}", flush=True)
    return reason


def _look(path: Path) -> tuple[Manifest | None, str | None]:
    """Return a checkpoint's manifest, if it has one, and what a look at the names and sizes finds wrong."""
    try:
        if not path.is_dir():
            raise BrokenCheckpointError("the folder is missing")
        manifest = Manifest.read(path)
        if manifest is None and not is_complete(path):
            raise BrokenCheckpointError("its saving did not end")
        if manifest is not None:
            manifest.check_sizes(path)
        return manifest, None
    except BrokenCheckpointError as error:
        return None, str(error)


def _verdict(manifest: Manifest | None, full: bool, seconds: float) -> str:
    if manifest is None:
        return f"unverified, for it has no {MANIFEST}; its saving came to an end"
    what = "sizes and checksums" if full and manifest.has_sums else "sizes"
    return f"{what} of {len(manifest.files)} files as saved ({manifest.size / 1e9:.2f} GB in {seconds:.1f} s)"
