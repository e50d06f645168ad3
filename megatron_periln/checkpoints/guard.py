"""What stands between a training run and its checkpoint folder."""

from __future__ import annotations

import functools
import os
import re
import shutil
import uuid
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from megatron_periln.checkpoints.fence import Fence
from megatron_periln.checkpoints.manifest import MANIFEST, BrokenCheckpointError, Manifest
from megatron_periln.checkpoints.rendezvous import Rendezvous
from megatron_periln.checkpoints.restart_attempt import RestartAttempt
from megatron_periln.checkpoints.sources import iteration_of, non_persistent_folder
from megatron_periln.checkpoints.sums import open_summed
from megatron_periln.checkpoints.watch import SaveWatch, watch_writer
from megatron_periln.errors import RankError, UsageError
from megatron_periln.files import replacing
from megatron_periln.patches import checkpoint_saving, checkpoint_writer

__all__ = ["SaveGuard", "failure", "install", "put_back", "tidy"]

# A checkpoint that is saved anew, until the new one counts; and what is being deleted.
_REPLACED, _DISCARDED = "replaced-", "discarded-"
# True at every moment of a save: that file is replaced whole, once the checkpoint is on the disk.
_WHAT_IS_LEFT = "what latest_checkpointed_iteration.txt names is complete"


def install(args: Namespace) -> None:
    """Guard the checkpoints that a run saves; take their folder when it begins to train.

    Not before: a run that fails while it starts would have taken the folder from one that is well.

    Parameters
    ----------
    args
        Megatron's and ours, parsed, of a run whose ``--save`` folder exists.

    Raises
    ------
    UsageError
        On rank 0, if another run has the folder, or it can't be read.
    """
    if args.save is None or args.enable_msc or args.ckpt_convert_format is not None:
        return
    if args.rank == 0:
        Fence.check_free(Path(args.save), _restart_attempt())
    if args.checkpoint_verify == "full":
        checkpoint_writer.open_with(open_summed)
    take = functools.partial(_take, args)
    checkpoint_saving.delete_with(_discard)
    checkpoint_writer.when_started(watch_writer)
    checkpoint_writer.save_without_a_process()
    checkpoint_saving.guard(SaveGuard(take, args.checkpoint_verify, args.distributed_timeout_minutes))


def put_back(args: Namespace) -> None:
    """Put back a checkpoint whose replacing was cut off, before the one to go on from is chosen.

    Parameters
    ----------
    args
        Megatron's and ours, parsed; nothing is done unless the run goes on in the folder that it saves to.

    Raises
    ------
    UsageError
        On rank 0, if another run has the folder, or it can't be written.
    """
    if args.save is None or args.load is None or args.enable_msc:
        return
    folder = Path(args.save)
    if folder.resolve() != Path(args.load).resolve():
        return
    ranks = Rendezvous(args)
    folders = [folder, *filter(None, [non_persistent_folder(args, "save")])]
    if ranks.rank == 0 and any(any(one.glob(f"{_REPLACED}iter_*")) for one in folders):
        _take(args)
    ranks.broadcast(None)


def _take(args: Namespace) -> Fence:
    folder, non_persistent = Path(args.save), non_persistent_folder(args, "save")
    fence = Fence.take(folder, _restart_attempt())
    try:
        tidy(folder)
        if non_persistent is not None:
            tidy(non_persistent)
    except OSError as error:
        raise UsageError(
            f"--save {folder}: what a save that was cut off left can't be cleared away: {error}; repair the "
            "folder, or give another"
        ) from error
    return fence


@functools.cache
def _restart_attempt() -> RestartAttempt:
    return RestartAttempt.from_environment()


def failure(args: Namespace, error: CheckpointException) -> UsageError:
    """Return what to tell of a checkpoint that torch failed to write or read, on whichever rank."""
    rank, (reason, _) = next(iter(error.failures.items()))
    text = f"a checkpoint could not be saved or loaded: rank {rank}: {' '.join(str(reason).split())}"
    if args.save is None or not Path(args.save).is_dir():
        return UsageError(text)
    free = shutil.disk_usage(args.save).free / 1e9
    return UsageError(
        f"{text}; the log says more above; --save {args.save} has {free:.1f} GB free; {_WHAT_IS_LEFT}"
    )


def tidy(folder: Path) -> None:
    """Remove what saves that were cut off left in a folder, and undo their replacing.

    A distributed checkpoint without .metadata, which is written after all data, can't be loaded by anyone.
    """
    if not folder.is_dir():  # that of non-persistent checkpoints, before the first of them
        return
    for replaced in sorted(folder.glob(f"{_REPLACED}iter_*")):
        original = folder / replaced.name.removeprefix(_REPLACED)
        if (original / MANIFEST).exists():
            _discard(replaced)
            continue
        _discard(original)
        replaced.replace(original)
    with os.scandir(folder) as entries:  # which tells folders without a stat
        found = [Path(entry) for entry in entries if entry.is_dir(follow_symlinks=False)]
    for path in found:
        if not path.name.startswith("iter_") or iteration_of(path) is None:
            continue
        if any((path / name).exists() for name in (MANIFEST, ".metadata")):
            continue  # without a look at its files, which may be tens of thousands
        names = [inner.name for inner in path.iterdir()]
        if not names or any(name.endswith(".distcp") for name in names):
            print(f"--save {folder}: removing {path.name}, whose saving did not end", flush=True)
            _discard(path)
    for path in folder.glob(f"{_DISCARDED}*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob("*.tmp"):
        if path.name.startswith("latest_checkpointed_iteration.txt."):
            path.unlink(missing_ok=True)


class SaveGuard:
    """Lets the newest restart attempt save, and a checkpoint count once it is complete.

    Parameters
    ----------
    take
        Takes the folder; called on rank 0, at the first iteration or save.
    verify
        ``--checkpoint-verify``.
    minutes
        ``--distributed-timeout-minutes``.
    """

    def __init__(self, take: Callable[[], Fence], verify: str, minutes: float) -> None:
        self._take, self.verify, self.minutes = take, verify, minutes
        self.watch = SaveWatch(minutes)

    @functools.cached_property
    def fence(self) -> Fence:
        """The folder, taken."""
        return self._take()

    def before_training(self) -> None:
        """Take the folder, and clear away what saves that were cut off left there."""
        self.fence.check()

    def before_save(self, folder: Path, *, persistent: bool = True) -> None:
        """Check that this run may and can write; move a checkpoint that is saved anew out of the way.

        The folder of a non-persistent checkpoint is not made yet: Megatron would take it for the newest,
        and delete the one before, which is the only one.
        """
        self.watch.begin(folder)
        self.fence.check()
        try:
            if folder.is_dir() and not folder.is_symlink() and any(folder.iterdir()):
                replaced = _replaced(folder)
                _discard(replaced)
                folder.replace(replaced)
            (folder if persistent else folder.parent).mkdir(parents=not persistent, exist_ok=True)
        except OSError as error:
            raise UsageError(_unwritable(folder, error)) from error

    def explain(self, folder: Path, error: Exception) -> Exception:
        """Return an error of a file system, or of ranks that have waited too long for one, as a user's."""
        if isinstance(error, OSError) and not isinstance(error, ConnectionError):
            return RankError(_unwritable(folder, error))
        if isinstance(error, RuntimeError) and re.search(r"time(d )?out", str(error), re.IGNORECASE):
            return RankError(
                f"{folder}: a rank has waited {self.minutes:g} minutes for another to save its part: the "
                "file system is slow, or hangs; repair it, or give --distributed-timeout-minutes more; "
                f"{_WHAT_IS_LEFT}"
            )
        return error

    def finalize(self, tracker: Path, text: str) -> None:
        """Write the manifest, and replace the tracker, whole, if this run may still write."""
        folder = tracker.parent / (text if text == "release" else f"iter_{int(text):07d}")
        try:
            self.fence.check()
            if self.verify != "off":
                Manifest.of(folder, sums=self.verify == "full").write(folder)
            with replacing(tracker) as (temporary,):
                temporary.write_text(text)
                # After a file was made in the folder: NFS then lists it anew.
                self.fence.check()
        except BrokenCheckpointError as error:
            raise UsageError(
                f"{folder}: the disk holds something else than was saved: {error}; {_WHAT_IS_LEFT}"
            ) from error
        except OSError as error:
            raise UsageError(_unwritable(folder, error)) from error
        self.watch.end()
        with suppress(OSError):
            _discard(_replaced(folder))


def _unwritable(folder: Path, error: OSError) -> str:
    return f"{folder}: cannot be written: {error.strerror or error}; {_WHAT_IS_LEFT}"


def _discard(folder: Path) -> None:
    """Delete a folder, if it is there; what is left of it, if that is cut off, bears no checkpoint's name."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.is_dir():
        discarded = folder.with_name(f"{_DISCARDED}{folder.name}-{uuid.uuid4().hex[:8]}")
        folder.replace(discarded)
        shutil.rmtree(discarded, ignore_errors=True)


def _replaced(folder: Path) -> Path:
    return folder.with_name(f"{_REPLACED}{folder.name}")
