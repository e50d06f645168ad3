"""What the ranks of a job tell each other before Megatron sets up its process groups."""

from __future__ import annotations

import itertools
import json
import time
from argparse import Namespace
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch

__all__ = ["Rendezvous"]

_PATIENCE = timedelta(hours=2)
_TRIES, _SECONDS_BETWEEN_TRIES = 60, 0.05

_store: Any = None
_keys = itertools.count(1)  # of this process: every rank says the same things in the same order


class Rendezvous:
    """Passes JSON through the store that the job's rendezvous has, at the address Megatron will use.

    Parameters
    ----------
    args
        Megatron's, parsed: ``rank`` and ``world_size``.
    """

    def __init__(self, args: Namespace) -> None:
        self.rank, self.size = args.rank, args.world_size
        if self.size > 1:
            self._store = torch.distributed.PrefixStore("megatron_periln", _job_store(self.rank, self.size))

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value on every rank."""
        if self.size == 1:
            return value
        key = str(next(_keys))
        if self.rank == 0:
            self._store.set(key, json.dumps(value))
            return value
        return self._wait(key)

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value on rank 0, nothing elsewhere."""
        if self.size == 1:
            return [value]
        key = str(next(_keys))
        if self.rank:
            self._store.set(f"{key}/{self.rank}", json.dumps(value))
            return []
        return [value, *(self._wait(f"{key}/{rank}") for rank in range(1, self.size))]

    def speaks_for_the_first(self) -> bool:
        """Tell whether this rank, which has met an error, is to tell of it because rank 0 does not.

        Rank 0 may have met the same error, or none: the others give it a few seconds to ask this as well,
        after which the lowest of those that have met it by then speaks.
        """
        if self.size == 1:
            return False
        if self.rank == 0:
            self._store.set("error/first", "")
            # The store may end with this process: the others are to have read it before.
            self._poll(lambda: self._store.add("error/heard", 0) == self.size - 1)
            return False
        try:
            self._store.set(f"error/of/{self.rank}", "")
            if self._poll(lambda: self._store.check(["error/first"])):
                self._store.add("error/heard", 1)
                return False
            if any(self._store.check([f"error/of/{lower}"]) for lower in range(1, self.rank)):
                self._poll(lambda: self._store.check(["error/told"]))  # torchrun ends all when the first ends
                return False
            self._store.set("error/told", "")
            return bool(self._store.add("error/others", 1) == 1)
        except torch.distributed.DistError:  # the store has gone with rank 0, which does not end silently
            return False

    def another_has_spoken(self) -> bool:
        """Tell whether another rank has met an error and tells of it, so that this one need not."""
        try:
            return self.size > 1 and bool(
                self._store.check(["error/first"]) or self._store.add("error/others", 0)
            )
        except torch.distributed.DistError:  # the store has gone with rank 0
            return False

    @staticmethod
    def _poll(condition: Callable[[], bool]) -> bool:
        """Return whether a condition becomes true within a few seconds."""
        for _ in range(_TRIES):
            if condition():
                return True
            time.sleep(_SECONDS_BETWEEN_TRIES)
        return False

    def _wait(self, key: str) -> Any:
        self._store.wait([key], _PATIENCE)
        return json.loads(self._store.get(key))


def _job_store(rank: int, size: int) -> Any:
    """Return the job's store; it lives as long as the process, for Megatron's connections go there too."""
    global _store
    if _store is None:
        _store = next(torch.distributed.rendezvous("env://", rank, size))[0]
    return _store
