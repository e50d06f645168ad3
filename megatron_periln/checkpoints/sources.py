"""Where Megatron looks for the checkpoint that a run goes on from.

Beside the persistent checkpoints in ``--load`` there may be non-persistent ones
(``--non-persistent-ckpt-type global``), in a folder within it or in ``--non-persistent-global-ckpt-dir``.
Megatron takes the newer of the two that the trackers name, the non-persistent one if both are of one
iteration (``_load_base_checkpoint`` in megatron/training/checkpointing.py). Those of ``local`` are in
`local`.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron.core import dist_checkpointing
from megatron.training import checkpointing

from megatron_periln.checkpoints.manifest import MANIFEST
from megatron_periln.errors import UsageError
from megatron_periln.patches import checkpoint_choice

__all__ = [
    "NON_PERSISTENT",
    "Candidate",
    "candidates",
    "is_complete",
    "iteration_of",
    "loads_from",
    "named_non_persistent",
    "non_persistent_folder",
    "take",
    "tracker_of",
]

NON_PERSISTENT: str = checkpointing._NON_PERSISTENT_CKPT_SUBDIR
"""The folder of global non-persistent checkpoints within ``--load`` and ``--save``."""


@dataclass(frozen=True)
class Candidate:
    """A checkpoint that a run may go on from.

    Attributes
    ----------
    path
        Its folder.
    persistent
        Whether it is one of ``--save-interval``'s.
    """

    path: Path
    persistent: bool

    @property
    def iteration(self) -> int:
        """Of the checkpoint; 0 of a release, which Megatron counts so."""
        return iteration_of(self.path) or 0


def loads_from(args: Namespace) -> str:
    """Return which Megatron reads, ``load`` or, at a run's start only, ``pretrained_checkpoint``."""
    started = args.pretrained_checkpoint is None or checkpointing.checkpoint_exists(args.load)
    return "load" if started else "pretrained_checkpoint"


def iteration_of(path: Path) -> int | None:
    """Return the iteration that a checkpoint's folder is named after, None if it is named otherwise."""
    number = path.name.removeprefix("iter_")
    return int(number) if number != path.name and number.isdecimal() else None


def is_complete(path: Path) -> bool:
    """Tell whether a checkpoint was saved to its end, if not whether it still is what was saved."""
    if (path / MANIFEST).exists() or (path / ".metadata").exists():
        return True
    try:
        return dist_checkpointing.check_is_distributed_checkpoint(str(path)) or any(path.glob("mp_rank_*"))
    except (OSError, ValueError, TypeError):
        return False


def tracker_of(folder: Path) -> str | None:
    """Return what latest_checkpointed_iteration.txt in a folder says, None if it is not there."""
    tracker = Path(checkpointing.get_checkpoint_tracker_filename(str(folder)))
    return tracker.read_text().strip() if tracker.is_file() else None


def non_persistent_folder(args: Namespace, load_arg: str = "load") -> Path | None:
    """Return the folder of global non-persistent checkpoints, None if the run has none."""
    if getattr(args, "non_persistent_ckpt_type", None) != "global":
        return None
    if args.non_persistent_global_ckpt_dir:
        return Path(args.non_persistent_global_ckpt_dir)
    folder = getattr(args, load_arg)
    return None if folder is None else Path(folder) / NON_PERSISTENT


def named_non_persistent(args: Namespace, load_arg: str = "load") -> int | None:
    """Return the iteration of the non-persistent checkpoint that the tracker names, None without any.

    Raises
    ------
    UsageError
        If the tracker names something else, at which Megatron ends, as if all were well.
    """
    folder = non_persistent_folder(args, load_arg)
    named = None if folder is None else tracker_of(folder)
    if named is None:
        return None
    if not named.isdecimal():
        tracker = checkpointing.get_checkpoint_tracker_filename(str(folder))
        raise UsageError(f"{tracker} names no iteration but {named!r}; write the number of one into it")
    return int(named)


def candidates(args: Namespace, load_arg: str) -> list[Candidate]:
    """Return the checkpoint that Megatron would load, and those that are older, the newest first.

    What ``--ckpt-step`` asks for, and a pretrained checkpoint, has no substitute. What Megatron, or a later
    check, refuses by itself is none: no folder, no tracker, no number in it.
    """
    folder, inner = Path(getattr(args, load_arg)), non_persistent_folder(args, load_arg)
    newest = named_non_persistent(args, load_arg)
    step, named = args.ckpt_step, tracker_of(folder) or ""
    if step:
        asked = [Candidate(folder / f"iter_{step:07d}", True)]
        if inner is not None and newest is not None:
            asked.append(Candidate(inner / f"iter_{step:07d}", False))
        return [found for found in asked if found.path.is_dir()][:1]
    found: list[Candidate] = []
    if newest is not None and inner is not None:
        found += [Candidate(path, False) for path in _named_and_older(inner, newest)]
    if named == "release":
        found.append(Candidate(folder / named, True))
    elif named.isdecimal():
        found += [Candidate(path, True) for path in _named_and_older(folder, int(named))]
    found.sort(key=lambda one: (-one.iteration, one.persistent))
    if load_arg != "load":
        found = found[:1]
    lost = len(found) == 1 and found[0].path.name != "release" and not found[0].path.is_dir()
    return [] if lost else found


def _named_and_older(folder: Path, newest: int) -> Iterator[Path]:
    """Yield the folder of an iteration, whether or not it is there, and complete ones of those before."""
    yield folder / f"iter_{newest:07d}"
    for path in folder.glob("iter_*"):
        number = iteration_of(path)
        if number is not None and number < newest and is_complete(path):
            yield path


def take(args: Namespace, load_arg: str, chosen: Candidate) -> None:
    """Have Megatron load a candidate, where it would take another by itself."""
    newest = named_non_persistent(args, load_arg)
    named = tracker_of(Path(getattr(args, load_arg))) or ""
    step = args.ckpt_step or (int(named) if named.isdecimal() else 0 if named == "release" else None)
    if chosen.persistent:
        if chosen.path.name != "release" and step != chosen.iteration:
            args.ckpt_step = chosen.iteration
        if newest is not None and newest >= chosen.iteration:
            checkpoint_choice.replace_non_persistent({newest: -1})
        return
    if newest is not None and newest != chosen.iteration:
        checkpoint_choice.replace_non_persistent({newest: chosen.iteration})
    if step is not None and step > chosen.iteration:
        args.ckpt_step = chosen.iteration
