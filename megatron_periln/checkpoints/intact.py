"""Which checkpoint a run goes on from: the newest that is what was saved."""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

from megatron.core import dist_checkpointing
from megatron.training.checkpointing import checkpoint_exists, get_checkpoint_tracker_filename

from megatron_periln.checkpoints.manifest import MANIFEST, BrokenCheckpointError, Manifest
from megatron_periln.checkpoints.rendezvous import Rendezvous
from megatron_periln.errors import UsageError

__all__ = ["FLAG_GROUP", "add_checkpoint_arguments", "choose_intact_checkpoint", "iteration_of", "loads_from"]

FLAG_GROUP = "checkpoints"


def add_checkpoint_arguments(parser: ArgumentParser) -> None:
    """Add the group of flags to a parser."""
    group = parser.add_argument_group(title=FLAG_GROUP)
    group.add_argument(
        "--checkpoint-verify",
        choices=("full", "size", "off"),
        default="full",
        help="check a checkpoint's checksums before loading it, or its files' sizes alone, and pass over a "
        "broken one for the one before; default: full",
    )


def loads_from(args: Namespace) -> str:
    """Return which Megatron reads, ``load`` or, at a run's start only, ``pretrained_checkpoint``."""
    started = args.pretrained_checkpoint is None or checkpoint_exists(args.load)
    return "load" if started else "pretrained_checkpoint"


def choose_intact_checkpoint(args: Namespace) -> None:
    """Check the checkpoint that ``args`` would load; set ``args.ckpt_step`` to an older one if it is broken.

    All ranks share the reading, and rank 0 tells in a line which is broken, which file, and which is
    used. A checkpoint that ``--ckpt-step`` asks for, and a pretrained one, have no substitute.

    Parameters
    ----------
    args
        Megatron's and ours, parsed.

    Raises
    ------
    UsageError
        On every rank, if there is a checkpoint and none is intact.
    """
    if args.checkpoint_verify == "off" or args.enable_msc:
        return
    flag = loads_from(args)
    folder = getattr(args, flag)
    if folder is not None:
        _choose(args, Path(folder), f"--{flag.replace('_', '-')}", Rendezvous(args))


def _choose(args: Namespace, folder: Path, flag: str, ranks: Rendezvous) -> None:
    substitutes = flag == "--load" and not args.ckpt_step
    candidates = [] if ranks.rank else list(_candidates(args, folder, substitutes))
    broken: list[str] = []
    for number in range(ranks.broadcast(len(candidates))):
        path = Path(ranks.broadcast(str(candidates[number]) if candidates else None))
        reason = _verify(path, args.checkpoint_verify == "full", ranks)
        if reason is None:
            if broken:
                args.ckpt_step = iteration_of(path)
                if ranks.rank == 0:
                    print(f"{flag} {folder}: {'; '.join(broken)}; using {path.name}", flush=True)
            return
        broken.append(f"{path.name} is broken: {reason}")
    if broken:
        raise UsageError(
            f"{flag} {folder}: {'; '.join(broken)}; restore a file that is named, give another {flag}, "
            "or load it as it is with --checkpoint-verify off"
        )


def _candidates(args: Namespace, folder: Path, substitutes: bool) -> Iterator[Path]:
    """Yield the checkpoint that Megatron would load, and those that are older, the newest first.

    What Megatron, or a later check, refuses by itself is none: no folder, no tracker, no number in it.
    """
    tracker = Path(get_checkpoint_tracker_filename(str(folder)))
    named = tracker.read_text().strip() if tracker.is_file() else ""
    if named == "release":
        yield folder / "release"
        return
    step = args.ckpt_step or (int(named) if named.isdecimal() else None)
    if step is None:
        return
    newest = folder / f"iter_{step:07d}"
    numbered = {iteration_of(path) or step: path for path in folder.glob("iter_*")} if substitutes else {}
    older = [
        numbered[number] for number in sorted(numbered) if number < step and _is_complete(numbered[number])
    ]
    if newest.is_dir() or older:
        yield newest
        yield from reversed(older)


def iteration_of(path: Path) -> int | None:
    """Return the iteration that a checkpoint's folder is named after, None if it is named otherwise."""
    number = path.name.removeprefix("iter_")
    return int(number) if number != path.name and number.isdecimal() else None


def _is_complete(path: Path) -> bool:
    """Tell whether a checkpoint was saved to its end, if not whether it still is what was saved."""
    if (path / MANIFEST).exists() or (path / ".metadata").exists():
        return True
    try:
        return dist_checkpointing.check_is_distributed_checkpoint(str(path)) or any(path.glob("mp_rank_*"))
    except (OSError, ValueError, TypeError):
        return False


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
        if manifest is None and not _is_complete(path):
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
