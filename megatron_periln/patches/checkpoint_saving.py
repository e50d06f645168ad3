"""Where this package stands in Megatron's saving of checkpoints.

``megatron.training.training`` finds ``save_checkpoint`` and ``train_step`` by name, and
megatron/training/checkpointing.py finds ``maybe_msc`` by name, which opens every file of its own. Functions
around the first two see a save and the first iteration begin on all ranks; one around ``maybe_msc.open``
sees rank 0 write latest_checkpointed_iteration.txt, with which a checkpoint counts, after a synchronous save
and an asynchronous one alike.
"""

from __future__ import annotations

import io
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.training import checkpointing, get_args, training

from megatron_periln.errors import UsageError
from megatron_periln.patches.registry import changes

__all__ = ["Guard", "delete_with", "guard"]

_TRACKER = Path(checkpointing.get_checkpoint_tracker_filename("")).name


class Guard(Protocol):
    """Watches over the saving of checkpoints; called on rank 0, where it may raise `UsageError`."""

    def before_training(self) -> None:
        """See the first iteration begin, of a run that has built and loaded all that it needs."""

    def before_save(self, folder: Path, *, persistent: bool) -> None:
        """See a save to ``folder`` begin, before anything is written."""

    def explain(self, folder: Path, error: Exception) -> Exception:
        """Return what to raise, on whichever rank, for what its part of the save raised."""

    def finalize(self, tracker: Path, text: str) -> None:
        """Write the tracker, which names a checkpoint that is complete."""


@changes(
    "megatron.training.training.save_checkpoint",
    "megatron.training.training.train_step",
    "megatron.training.checkpointing.maybe_msc",
    why="a checkpoint is to count once it is complete and if this run may still write, which it may from "
    "its first iteration on. Megatron has no hook for any of these, and truncates the file that names the "
    "checkpoint before it writes it: a run killed in between could not go on",
    until=(
        "patches/test_checkpoint_saving.py::test_upstream_still_truncates_the_tracker",
        "patches/test_checkpoint_saving.py::test_upstream_still_has_no_hook_around_a_save",
    ),
)
def guard(guard: Guard) -> None:
    """Let ``guard`` watch over every checkpoint that this process saves."""
    save, train_step = training.save_checkpoint, training.train_step
    before_training = [guard.before_training]

    def guarded_step(*args: Any, **kwargs: Any) -> Any:
        while before_training:
            _first(before_training.pop())
        return train_step(*args, **kwargs)

    def guarded_save(
        iteration: int, *args: Any, non_persistent_ckpt: bool = False, release: bool = False, **kwargs: Any
    ) -> Any:
        call = partial(
            save, iteration, *args, non_persistent_ckpt=non_persistent_ckpt, release=release, **kwargs
        )
        place = _non_persistent_folder(get_args()) if non_persistent_ckpt else get_args().save
        if place is None:
            return call()
        folder = Path(
            checkpointing.get_checkpoint_name(place, iteration, release=release, return_base_dir=True)
        )
        _first(lambda: guard.before_save(folder, persistent=not non_persistent_ckpt))
        try:
            return call()
        except Exception as error:
            explained = guard.explain(folder, error)
            if explained is error:
                raise
            raise explained from error

    training.save_checkpoint, training.train_step = guarded_save, guarded_step
    checkpointing.maybe_msc = _Storage(checkpointing.maybe_msc, guard)


@changes(
    "megatron.training.checkpointing.shutil",
    why="old checkpoints are deleted file by file, beside the training: if the run ends meanwhile, a part is "
    "left under the name of the whole",
    until="patches/test_checkpoint_saving.py::test_upstream_still_deletes_old_checkpoints_under_their_names",
)
def delete_with(delete: Callable[[Path], None]) -> None:
    """Let ``delete`` delete old checkpoints: of ``--save-retain-interval``, and non-persistent ones."""
    checkpointing.shutil = _Deleting(checkpointing.shutil, delete)


class _Deleting:
    """The module shutil, but for deleting."""

    def __init__(self, module: Any, delete: Callable[[Path], None]) -> None:
        self._module, self._delete = module, delete

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def rmtree(self, folder: str | Path) -> None:
        self._delete(Path(folder))


def _non_persistent_folder(args: Namespace) -> str | None:
    """Return where global non-persistent checkpoints go, None for local ones: see `local_checkpoints`."""
    if args.non_persistent_ckpt_type != "global":
        return None
    folder: str | None = args.non_persistent_global_ckpt_dir
    return folder or str(Path(args.save) / checkpointing._NON_PERSISTENT_CKPT_SUBDIR)


def _first(call: Callable[[], None]) -> None:
    """Call on rank 0, while the others wait; what is wrong there ends them all."""
    error: list[str | None] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            call()
        except UsageError as mistake:
            error = [str(mistake)]
    torch.distributed.broadcast_object_list(error, src=0)
    if error[0] is not None:
        raise UsageError(error[0])


class _Storage:
    """Megatron's file access, but for the tracker."""

    def __init__(self, storage: Any, guard: Guard) -> None:
        self._storage, self._guard = storage, guard

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def open(self, path: str, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode == "w" and Path(path).name == _TRACKER:
            return _Tracker(self._guard, Path(path))
        return self._storage.open(path, mode, *args, **kwargs)


class _Tracker(io.StringIO):
    """Collects the tracker's text, and has the guard write it."""

    def __init__(self, guard: Guard, path: Path) -> None:
        super().__init__()
        self._guard, self._path = guard, path

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self._guard.finalize(self._path, self.getvalue())
