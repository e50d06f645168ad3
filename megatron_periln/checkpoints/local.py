"""Local checkpoints: every rank's own files, on a disk of its node (``--non-persistent-ckpt-type local``).

nvidia-resiliency-ext writes ``RANK/iter_N_RANK_local.pt`` in ``--non-persistent-local-ckpt-dir``, and takes
the newest iteration of which every rank has its file. Beside each file goes one with its size and checksum,
named so that nvidia-resiliency-ext deletes both together.
"""

from __future__ import annotations

import functools
import re
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from megatron_periln.checkpoints.rendezvous import Rendezvous
from megatron_periln.checkpoints.sums import sum_file
from megatron_periln.errors import RankError
from megatron_periln.files import write_text
from megatron_periln.patches import local_checkpoints

__all__ = ["LocalGuard", "install", "newest_intact", "sum_up"]

_FILE = re.compile(r"iter_(\d{7})_(\d+)_local\.pt")


def newest_intact(args: Namespace, ranks: Rendezvous) -> int:
    """Return the newest iteration of which every rank has an intact local file, -1 if there is none.

    A file is renamed once it is broken: nvidia-resiliency-ext finds it no more.
    """
    if getattr(args, "non_persistent_ckpt_type", None) != "local" or not args.non_persistent_local_ckpt_dir:
        return -1
    folder = Path(args.non_persistent_local_ckpt_dir) / str(ranks.rank)
    intact: list[tuple[int, int]] = []
    for path in sorted(folder.glob("iter_*_local.pt")) if folder.is_dir() else []:
        match = _FILE.fullmatch(path.name)
        if match is None or (not args.replication and int(match[2]) != ranks.rank):
            continue
        reason = _what_is_wrong(path, args.checkpoint_verify)
        if reason is None:
            intact.append((int(match[1]), int(match[2])))
        else:
            path.replace(path.with_name(f"broken-{path.name}"))
            print(f"{path}: broken, and not used: {reason}", flush=True)
    found = defaultdict(set)
    for rank_has in ranks.gather(intact):
        for iteration, rank in rank_has:
            found[iteration].add(rank)
    newest = max((number for number, has in found.items() if has == set(range(ranks.size))), default=-1)
    return int(ranks.broadcast(newest))


def _what_is_wrong(path: Path, verify: str) -> str | None:
    try:
        size, crc = _sums_of(path).read_text().split()
    except (FileNotFoundError, ValueError):  # stock Megatron's, or killed in between: unverified
        return None
    now = path.stat().st_size
    if verify != "off" and now != int(size):
        return f"it has {now:,} bytes instead of {int(size):,}"
    if verify == "full" and crc != "-" and (found := sum_file(path)) != crc:
        return f"it has checksum {found} instead of {crc}"
    return None


def _sums_of(path: Path) -> Path:
    return path.with_name(f"{path.stem}.crc32.pt")


def sum_up(verify: str, path: Path) -> None:
    """Write the size and checksum of a local file that was just written beside it, unless it is "off"."""
    if verify == "off":
        return
    crc = sum_file(path) if verify == "full" else "-"
    write_text(_sums_of(path), f"{path.stat().st_size} {crc}\n")


class LocalGuard:
    """Compares what local files say of their model before it is loaded.

    Parameters
    ----------
    compare
        Raises an error if it is given the saved arguments of another model than the run's.
    """

    def __init__(self, compare: Callable[[Namespace], None]) -> None:
        self._compare = compare

    def loaded(self, saved: Namespace | None) -> None:
        """Compare the saved arguments with the run's."""
        if saved is not None:
            self._compare(saved)

    def explain(self, path: Path, error: Exception) -> Exception:
        """Return what to raise for a file that could not be read."""
        cause = " ".join(str(error).split()) or type(error).__name__
        return RankError(
            f"{path} can't be read: {cause}; delete the local checkpoints of that iteration on every node, "
            "and the run goes on from the one before"
        )


def install(args: Namespace, compare: Callable[[Namespace], None]) -> None:
    """Guard the local checkpoints of a run; nothing is done for a run without them.

    Parameters
    ----------
    args
        Megatron's and ours, validated.
    compare
        As of `LocalGuard`.
    """
    if args.non_persistent_ckpt_type == "local":
        local_checkpoints.guard_local(LocalGuard(compare), functools.partial(sum_up, args.checkpoint_verify))
