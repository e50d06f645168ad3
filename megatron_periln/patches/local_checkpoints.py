"""Where this package stands in nvidia-resiliency-ext's saving and loading of local checkpoints."""

from __future__ import annotations

import functools
import importlib
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_periln.patches.registry import changes

__all__ = ["LocalGuard", "guard_local"]

_MODULE = "nvidia_resiliency_ext.checkpointing.local.ckpt_managers.local_manager"


class LocalGuard(Protocol):
    """Watches over the loading of local checkpoints, on every rank."""

    def loaded(self, saved: Namespace | None) -> None:
        """See the saved arguments of the checkpoint that is being loaded; may raise."""

    def explain(self, path: Path, error: Exception) -> Exception:
        """Return what to raise for a file that could not be read."""


@changes(
    f"{_MODULE}.LocalCheckpointManager.save",
    f"{_MODULE}.LocalCheckpointManager.load",
    why="a local checkpoint has no checksums, and Megatron compares of what it says of its model neither the "
    "placement nor the epsilon",
    stays="the package is optional, and its API has no hook for either",
)
def guard_local(guard: LocalGuard, written: Callable[[Path], None]) -> None:
    """Let ``guard`` watch over every local checkpoint that this process loads.

    ``written`` is called with each file that was just written, in whatever process: pickled by its name.
    """
    manager = importlib.import_module(_MODULE).LocalCheckpointManager  # not everywhere installed
    save, load = manager.save, manager.load

    @functools.wraps(save)
    def guarded_save(self: Any, state_dict: Any, iteration: int, is_async: bool = False) -> Any:
        request = save(self, state_dict, iteration, is_async)
        if request is not None:
            write = functools.partial(_write, written, request.async_fn)
            return request._replace(async_fn=write)
        for path in self.local_ckpt_dir.glob(f"iter_{iteration:07d}_*_local.pt"):
            written(path)
        return None

    @functools.wraps(load)
    def guarded_load(self: Any) -> Any:
        path = self._local_ckpt_path_from_id(self._ckpt_id(self.latest_iteration))
        try:
            state_dict, name = load(self)
        except (OSError, RuntimeError, ValueError, EOFError) as error:
            raise guard.explain(path, error) from error
        guard.loaded(state_dict.common_state_dict.get("args"))
        return state_dict, name

    manager.save, manager.load = guarded_save, guarded_load


def _write(
    written: Callable[[Path], None], write: Callable[..., None], parts: Mapping[Any, Any], *args: Any
) -> None:
    """Write the files of one rank, and of those whose replicas it keeps; in whatever process."""
    writer: Any = write.__self__  # type: ignore[attr-defined]
    write(parts, *args)
    for part in parts:
        written(writer._local_ckpt_path_from_id(part))
