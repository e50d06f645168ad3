"""What stands between a training run and its checkpoint folder."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path

from megatron_periln.checkpoints import upstream
from megatron_periln.checkpoints.fence import Fence
from megatron_periln.checkpoints.incarnation import Incarnation
from megatron_periln.errors import UsageError
from megatron_periln.files import sync

__all__ = ["SaveGuard", "install"]


def install(args: Namespace) -> None:
    """Guard the checkpoints that a run saves.

    Parameters
    ----------
    args
        Megatron's, parsed, of a run whose ``--save`` folder exists.

    Raises
    ------
    UsageError
        On rank 0, if another run has the folder.
    """
    if args.save is None or args.enable_msc:
        return
    fence = None
    if args.rank == 0:
        fence = Fence.take(Path(args.save), Incarnation.from_environment())
    upstream.guard(SaveGuard(fence))


class SaveGuard:
    """Lets the newest incarnation save, and a checkpoint count once it is complete."""

    def __init__(self, fence: Fence | None) -> None:
        self.fence = fence

    def before_save(self, iteration: int) -> None:
        """Check that this run may still write."""
        assert self.fence is not None
        self.fence.check()

    def publish(self, tracker: Path, text: str) -> None:
        """Replace the tracker, whole, if this run may still write."""
        assert self.fence is not None
        temporary = tracker.with_name(f"{tracker.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(text)
            sync(temporary)
            # After a file was made in the folder: NFS then lists it anew.
            self.fence.check()
            temporary.replace(tracker)
            sync(tracker.parent)
        except OSError as error:
            raise UsageError(
                f"{tracker}: cannot be written: {error.strerror or error}; checkpoint {text} is complete "
                f"but does not count until {tracker.name} names it"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
