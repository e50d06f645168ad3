"""The one place where this package stands in Megatron's saving of checkpoints.

``megatron.training.training`` finds ``save_checkpoint`` by name, and megatron/training/checkpointing.py
finds ``schedule_async_save`` and ``maybe_msc`` by name; the latter opens every file of its own. Functions
around the first two see a save begin and end on all ranks; one around ``maybe_msc.open`` sees rank 0
write latest_checkpointed_iteration.txt, with which a checkpoint counts.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.training import checkpointing, training

from megatron_periln.errors import UsageError

__all__ = ["Guard", "guard"]

_TRACKER = Path(checkpointing.get_checkpoint_tracker_filename("")).name


class Guard(Protocol):
    """Watches over the saving of checkpoints; each method is called on rank 0, and may raise `UsageError`."""

    def before_save(self, iteration: int) -> None:
        """See a save begin, before anything is written."""

    def publish(self, tracker: Path, text: str) -> None:
        """Write the tracker, which names a checkpoint that is complete."""


def guard(guard: Guard) -> None:
    """Let ``guard`` watch over every checkpoint that this process saves."""
    save, schedule, storage = (
        training.save_checkpoint,
        checkpointing.schedule_async_save,
        checkpointing.maybe_msc,
    )

    def guarded_save(iteration: int, *args: Any, **kwargs: Any) -> Any:
        _together(lambda: guard.before_save(iteration) if _is_first() else None)
        return _together(lambda: save(iteration, *args, **kwargs))

    def guarded_schedule(request: Any) -> Any:
        finalize = list(request.finalize_fns)
        request.finalize_fns[:] = [lambda: _together(lambda: [function() for function in finalize])]
        return schedule(request)

    training.save_checkpoint = guarded_save
    checkpointing.schedule_async_save = guarded_schedule
    checkpointing.maybe_msc = _Storage(storage, guard)


def _is_first() -> bool:
    return torch.distributed.get_rank() == 0


def _together(call: Callable[[], Any]) -> Any:
    """Call on all ranks; what is wrong on rank 0 ends them all with one error."""
    error: list[str | None] = [None]
    result = None
    try:
        result = call()
    except UsageError as mistake:
        error = [str(mistake)]
    torch.distributed.broadcast_object_list(error, src=0)
    if error[0] is not None:
        raise UsageError(error[0])
    return result


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
    """Collects the tracker's text, and has it published."""

    def __init__(self, guard: Guard, path: Path) -> None:
        super().__init__()
        self._guard, self._path = guard, path

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self._guard.publish(self._path, self.getvalue())
